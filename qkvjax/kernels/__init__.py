"""The hot path: attention over given queries, keys and values."""

IMPLEMENTATIONS = ("xla", "reference", "hopper", "triton", "cudnn", "tpu")  # see `dispatch`
preferred = "auto"  # what "auto" stands for, if a door was told: in the whole process
