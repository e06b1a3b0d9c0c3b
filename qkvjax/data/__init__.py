"""From documents to batches: sources, tokenizers, packing, batches by (seed, step)."""
