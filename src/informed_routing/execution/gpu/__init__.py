"""The GPU engine: Triton kernels around device-side selections, decode steps replayed as CUDA graphs."""
