"""How long a probe takes and how much it holds, against what it could be at best."""
