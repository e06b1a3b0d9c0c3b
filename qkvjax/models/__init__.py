"""Language models built around the attention layer."""
