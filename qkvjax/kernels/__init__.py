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
preferred = "auto"  # what "auto" stands for, if a command names one: in the whole process
