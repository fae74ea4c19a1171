"""What runs a loaded network: dtype, graph capture, compilation, and the fused modules that take others' places."""
