"""C++ kernels in tests: the forms they are tried on, building and running them, here and under emulation."""
