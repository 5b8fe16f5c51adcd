"""The stages of a training step, in the words of the public contract."""

STAGES = (
    "initial-state",
    "batch",
    "forward",
    "loss",
    "backward",
    "gradient",
    "grad-norm",
    "optimizer-state",
    "update",
    "buffer",
    "checkpoint",
)
"""In the order in which one causes the next."""
