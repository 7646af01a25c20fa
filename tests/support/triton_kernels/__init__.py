"""Triton kernels in tests: the forms they are tried on, the interpreter, and compilation for GPUs that are not here."""
