"""Attention through XLA, on every device."""
