"""Every n-th place of a dim for each rank: samples dealt out in turn (`DistributedSampler`), or blocks of several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


def candidates(marks: Tensor, held: Tensor, starts: Tensor, tolerance: float) -> Iterator[Tensor]:
    """Places at one distance from each other whose marks are those of a piece; arguments as for slices."""
    if len(held) < 2:
        return
    size = len(marks)
    for step in dict.fromkeys((size // len(held), -(-size // len(held)))):
        if step < 2:
            continue
        for start in starts[starts < step].tolist():
            index = torch.arange(start, size, step)[: len(held)]
            if len(index) == len(held) and bool(((marks[index] - held).abs() <= tolerance).all()):
                yield index


def named(index: Mapping[int, Tensor], size: int, dim: int) -> str:
    """The layout in words; empty if places are not dealt out in turn."""
    distinct = {tuple(places.tolist()) for places in index.values() if len(places)}
    turns = len(distinct)
    if turns < 2 or max(map(len, distinct)) < 2:
        return ""
    for width in dict.fromkeys((1, _width(next(iter(distinct))))):
        dealt = torch.arange(size).div(width, rounding_mode="floor") % turns
        if {tuple((dealt == turn).nonzero()[:, 0].tolist()) for turn in range(turns)} == distinct:
            what = f"every {ordinal(turns)} of dim {dim}"
            return f"interleaved: {what}" if width == 1 else f"interleaved: {what} in blocks of {width}"
    return ""


def _width(places: tuple[int, ...]) -> int:
    """How many places lie one after the other at the beginning."""
    return next((n for n in range(1, len(places)) if places[n] != places[n - 1] + 1), len(places))


def ordinal(number: int) -> str:
    """`2nd`, `3rd`, `4th`, `11th`."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
