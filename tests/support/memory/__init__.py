"""What a function allocates, and what it reads."""
