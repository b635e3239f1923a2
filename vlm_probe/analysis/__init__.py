"""What a result means."""
