"""Attention on TPUs (Pallas, Mosaic)."""
