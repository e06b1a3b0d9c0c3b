"""Attention on NVIDIA GPUs of compute capability 9.0, in warpgroups (Pallas, Mosaic GPU)."""
