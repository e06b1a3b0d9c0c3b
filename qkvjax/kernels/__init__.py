"""The hot path: attention over given queries, keys and values."""

IMPLEMENTATIONS = (
    "xla",
    "reference",
    "hopper",
    "triton",
    "cudnn",
    "splash",
    "tpu",
)  # see `dispatch`
