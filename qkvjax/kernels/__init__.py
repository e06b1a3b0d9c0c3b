"""The hot path: attention over given queries, keys and values."""
