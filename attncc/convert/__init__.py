"""Offline conversion: `attncc convert`."""
