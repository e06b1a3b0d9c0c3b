"""Language models, encoders and vision transformers, built around the attention layer."""
