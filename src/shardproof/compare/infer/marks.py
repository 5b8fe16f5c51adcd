"""A few numbers per slice, by which slices are told apart before any is looked at in full."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardproof.compare.infer.residual import CHUNK, acceptable
from shardproof.compare.measure import scale, wide

PROBES = 8
"""Projections per slice. Slices of no more elements than this are marked by the elements themselves."""

REACH = 4.0
"""Times the root of a slice's elements that a projection may move where each element moves by no more than one unit.
A random one moves by less than one; what it lets through is looked at in full."""

LOOKED_AT = 32
"""Places by which it is told quickly that a slice is not here."""

ROUNDING = 1e-14
"""Of a projection in float64, relative to its terms' root sum of squares: 50 ulp."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Probes:
    """Random projections of a slice, products of one factor for what stands before its dim and one for what is after.

    Two thin factors, so that they take no room beside the tensor, however long its slices are.
    """

    before: Tensor
    """(elements before the dim, probes)"""
    after: Tensor
    """(elements after it, probes)"""
    plain: bool
    """Whether slices are so short that their elements are marks themselves."""

    @classmethod
    def of(cls, shape: Sequence[int], dim: int) -> Probes:
        """For tensors of this shape, whatever their extent along `dim`."""
        sizes = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
        # Normal numbers and not signs: of two equal terms, signs would cancel half of the time.
        draw = torch.Generator().manual_seed(0)
        before, after = (
            torch.randn(size, PROBES, generator=draw, dtype=torch.float64)
            if size > 1
            else torch.ones(size, PROBES).double()
            for size in sizes
        )
        return cls(before=before, after=after, plain=sizes[0] * sizes[1] <= PROBES)

    def marks(self, tensor: Tensor, dim: int) -> Tensor:
        """(extent along `dim`, probes) in float64."""
        before, after = len(self.before), len(self.after)
        size = tensor.shape[dim]
        cube = tensor.reshape(before, size, after)
        if self.plain:
            return _finite(wide(cube)).movedim(1, 0).reshape(size, before * after)
        found = torch.zeros(size, PROBES, dtype=torch.float64)
        if after < PROBES:
            # Few elements behind the dim: each of them in turn, so that nothing grows by a factor of `PROBES`.
            deep = max(CHUNK // max(size, 1), 1)
            for first in range(0, before, deep):
                for last in range(after):
                    some = _finite(wide(cube[first : first + deep, :, last]))
                    found += some.t() @ (self.before[first : first + deep] * self.after[last])
            return found
        deep = max(CHUNK // max(size * after, 1), 1)
        tall = max(CHUNK // max(after, 1), 1)
        for first in range(0, before, deep):
            for row in range(0, size, tall):
                some = _finite(wide(cube[first : first + deep, row : row + tall]))
                # (some before, some rows, probes), each then weighed by its factor before the dim.
                thin = some @ self.after
                found[row : row + tall] += (thin * self.before[first : first + deep, None]).sum(0)
        return found

    def tolerance(self, whole: Tensor, floor: float) -> float:
        """How far apart two marks of the same slice can be."""
        if self.plain:
            return acceptable(floor)
        length = math.sqrt(len(self.before) * len(self.after))
        # Elements move by one floor at most where all is right, and by several only here and there.
        return REACH * length * (floor + ROUNDING * scale_of(whole))


def scale_of(tensor: Tensor) -> float:
    """max|x|, chunk by chunk."""
    if tensor.numel() <= CHUNK:
        return scale(tensor)
    return max(scale(part) for part in torch.split(tensor.reshape(-1), CHUNK))


def _finite(values: Tensor) -> Tensor:
    # An infinity that both hold (a mask) must not spoil the rest; whether they do hold it is seen in full.
    return values.nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0)


def rows_like(marks: Tensor, mark: Tensor, tolerance: float) -> Tensor:
    """Places whose marks are `mark`."""
    near = ((marks[:, 0] - mark[0]).abs() <= tolerance).nonzero()[:, 0]
    return near[((marks[near] - mark).abs() <= tolerance).all(1)]


def going_on(marks: Tensor, held: Tensor, starts: Tensor, tolerance: float) -> Tensor:
    """Those of `starts` from which all of `held` may follow, as far as some of its places tell."""
    alive = starts[starts + len(held) <= len(marks)]
    for step in torch.linspace(len(held) - 1, 0, min(len(held), LOOKED_AT)).long().tolist():
        if len(alive) < 2:
            break
        alive = alive[((marks[alive + step] - held[step]).abs() <= tolerance).all(1)]
    return alive


def longest(marks: Tensor, held: Tensor, starts: Tensor, tolerance: float, most: int) -> Tensor:
    """Those of `starts` from which `held` is followed farthest, until no more than `most` are left."""
    alive = starts
    for step in range(1, len(held)):
        if len(alive) <= most:
            break
        on = alive[alive + step < len(marks)]
        on = on[((marks[on + step] - held[step]).abs() <= tolerance).all(1)]
        if not len(on):
            break
        alive = on
    return alive
