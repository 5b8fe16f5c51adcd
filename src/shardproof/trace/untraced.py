"""Hooks that torch.compile leaves alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def untraced(hook: Callable[..., None]) -> Callable[..., None]:
    """`hook`, called as it is where torch.compile would trace it as a part of the user's code."""
    # Looked up by name: importing torch._dynamo costs 0.3 s, and who compiles has loaded it.
    dynamo: Any = sys.modules.get("torch._dynamo")
    return hook if dynamo is None else dynamo.disable(hook)
