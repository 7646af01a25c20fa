"""A kernel store in a temporary folder, and a disk that is full."""
