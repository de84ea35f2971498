"""Triton kernels of the GPU engine, each beside its PyTorch reference; Triton's interpreter runs them on a CPU."""
