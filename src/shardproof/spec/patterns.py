"""Name patterns with wildcards, read as torch's parallelize_module reads them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from shardproof.errors import PatternError

SHOWN = 6
"""Near names listed in an error: enough to find the right one, few enough for one line."""


def matches(name: str, pattern: str) -> bool:
    """Whether each dotted part of `name` matches the same part of `pattern` (`blocks.*.fc1`, `head`)."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def select(names: Iterable[str], pattern: str, *, field: str, kind: str = "module") -> list[str]:
    """The `names` that match `pattern`, in their order.

    Raises `PatternError` that lists the nearest names where none does.
    """
    names = [name for name in names if name]
    found = [name for name in names if matches(name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern, names, n=SHOWN, cutoff=0.3) or names[:SHOWN]
        listed = ", ".join(near) if near else f"the model has no {kind} with a name"
        raise PatternError(f"{field}: {pattern!r} matches no {kind} of the model; near names: {listed}")
    return found
