"""Measurements of what the compiled kernels do on a CPU."""
