"""What a model costs: parameters, multiply-adds, cache, memory, and time."""
