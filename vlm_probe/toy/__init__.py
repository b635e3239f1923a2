"""A world where every answer is known, and the small stack trained on it."""
