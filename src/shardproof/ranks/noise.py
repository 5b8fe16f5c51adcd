"""Warnings of torch that say nothing about the user's code, each with the reason why it is not shown."""

from __future__ import annotations

import re
import warnings

WARNINGS = (
    # The axes "dp_replicate" and "dp_shard" flattened are "dp", looked up as mesh["dp"]: our own doing.
    "Slicing a flattened dim from root mesh will be deprecated",
    # Says that an in-place operation later on might give wrong gradients. Whether it does is what a check finds out.
    "FSDP2-wrapped module (",
)
"""How the messages begin, word for word."""


def silence() -> None:
    """Hides `WARNINGS` in this process, also where warnings are errors."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=re.escape(message))


NATIVE_LOG = re.compile(r"^(\[rank\d+\]:)?\[[WE]\d{3,} .*\.(cpp|hpp|cc|h):\d+\]")
"""A line that torch's C++ code logs, as `[W1122 00:07:02 socket.cpp:204] ...`."""
