"""Recognising attention that normalises its scores."""
