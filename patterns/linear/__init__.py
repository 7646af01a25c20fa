"""Recognising linear attention and recurrences."""
