"""What is kept of a tensor when its traces are gone: who holds which part, values side by side, where it differs.

A check may hold terabytes of traces and keeps a few kilobytes of a few tensors. Everything here is bounded by the
constants below, whatever the sizes of model and world. How it is made: `compare.drawn`.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass

KEPT = 32
"""Tensors of a run of which a picture is kept."""

ELEMENTS = 2**23
"""Elements that the pictures of a run may look at, over all ranks: a fraction of a second."""

CELLS = 64
"""Rows and columns of the map that a tensor is pooled to."""

WINDOW = 8
"""Rows and columns of values that are kept, around the element that differs most."""

RANKS = 8
"""Ranks of which values are kept, the wrong ones first."""

LARGEST_SETS = 255
"""Different sets of ranks that one map tells apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One tensor, folded to rows and columns and pooled to a map of at most `CELLS` x `CELLS` cells."""

    key: tuple[int, str, str, str]
    """Step, stage, name, part."""

    shape: tuple[int, ...]
    """Of the canonical tensor; of a batch, of what all data ranks read."""

    split: int
    """Dims before this one make up the rows, the others the columns."""

    cells: tuple[int, int]
    """Rows and columns of the map."""

    owners: tuple[tuple[int, ...], ...]
    """Sets of ranks that hold the same cells."""

    held: bytes
    """Per cell, row by row, which of `owners` holds it."""

    heat: array[float]
    """Per cell the largest |got - want|, infinite for NaN; empty where nothing differs."""

    first: tuple[int, int]
    """Row and column of the first value of the window."""

    window: tuple[int, int]
    """Rows and columns of the window."""

    want: tuple[float, ...]
    """The reference's values in the window, row by row; NaN where nobody looked."""

    got: tuple[tuple[int, tuple[float | None, ...]], ...]
    """(rank, its values in the window), None for what it does not hold."""

    @property
    def rows(self) -> int:
        """Of the folded tensor."""
        return math.prod(self.shape[: self.split])

    @property
    def columns(self) -> int:
        """Of the folded tensor."""
        return math.prod(self.shape[self.split :])
