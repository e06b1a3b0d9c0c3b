"""Attention on NVIDIA GPUs from compute capability 8.0 on (Pallas, Triton)."""
