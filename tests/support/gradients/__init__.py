"""Gradients of compiled models, held against those of the models themselves."""
