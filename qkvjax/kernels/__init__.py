"""The hot path: attention over given queries, keys and values."""

# What `impl` may name; `dispatch` says what each one is.
IMPLEMENTATIONS = (
    "xla",
    "reference",
    "hopper",
    "triton",
    "cudnn",
    "splash",
    "tpu",
)
