"""Sampling through the decode cache."""
