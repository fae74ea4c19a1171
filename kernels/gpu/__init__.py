"""Kernels in integers for NVIDIA GPUs, in Triton: each gives the bits of the module of its name one floor above."""
