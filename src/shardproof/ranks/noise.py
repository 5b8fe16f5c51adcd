"""Warnings of torch that say nothing about the user's code, each with the reason why it is not shown."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable

WARNINGS = (
    # The axes "dp_replicate" and "dp_shard" flattened are "dp", looked up as mesh["dp"]: our own doing.
    "Slicing a flattened dim from root mesh will be deprecated",
    # Says that an in-place operation later on might give wrong gradients. Whether it does is what a check finds out.
    "FSDP2-wrapped module (",
)
"""How the messages begin, word for word."""


LOGGED = re.compile(
    r"^\[rank\d+\]:\[?[WE]\d{3,} .*("
    # DDP is told to look for unused parameters, as it would otherwise leave their bucket unreduced in silence.
    r"reducer\.cpp:\d+\] Warning: find_unused_parameters=True was specified"
    # DTensor logs the traceback of an exception that it then raises, once a line and rank.
    r"|torch/_subclasses/fake_tensor\.py:\d+\]"
    r")"
)
"""Lines that torch logs past Python's warnings and that say nothing about the user's code."""


def without_noise(lines: Iterable[str]) -> list[str]:
    """The lines that are not `LOGGED` by torch alone."""
    return [line for line in lines if not LOGGED.match(line)]


def silence() -> None:
    """Hides `WARNINGS` in this process, also where warnings are errors."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=re.escape(message))


def silence_native() -> None:
    """To be called before torch is loaded: what its C++ code merely warns of is not logged by this process.

    For ranks of a launch, whose output nobody filters: each would log what is `LOGGED`. A user who sets
    TORCH_CPP_LOG_LEVEL has it his way.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


NATIVE_LOG = re.compile(r"^(\[rank\d+\]:)?\[[WE]\d{3,} .*\.(cpp|hpp|cc|h):\d+\]|^terminate called .* 'gloo::")
"""A line that torch's C++ code logs, as `[W1122 00:07:02 socket.cpp:204] ...`, or gloo's last words."""
