"""Decoding: sampling of tokens through the caches of a language model."""
