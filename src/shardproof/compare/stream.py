"""Go through large tensors once, in pieces that stay in a core's cache: recordings are gigabytes, and mapped from disk.

Beside the tensors, each pass holds a few chunks, whatever the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 2**21
"""Of one side: what it costs to call torch is little beside the work, and a second look finds most of it in the cache.
Half of it takes a sixth longer, and twice as much is no quicker (`benchmarks/record.py diff`)."""

ROW = 1024
"""Elements of a chunk that are looked at together where its largest difference has to be known exactly."""

EXACT = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes whose differences are taken by `Differences`."""

SINGLE_EPS = torch.finfo(torch.float32).eps

WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


def wide(tensor: Tensor) -> Tensor:
    """In float64, so that a comparison adds no rounding of its own."""
    return tensor.to(torch.float64)


def chunks(*tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """The same elements of tensors of one shape, in row-major order: (number of the first, flat pieces).

    Pieces of contiguous tensors are views.
    """
    first = tensors[0]
    size = CHUNK_BYTES // max(tensor.element_size() for tensor in tensors)
    if all(tensor.is_contiguous() for tensor in tensors):
        flat = [tensor.view(-1) for tensor in tensors]
        for start in range(0, first.numel(), size):
            yield start, tuple(tensor[start : start + size] for tensor in flat)
        return
    if first.numel() <= size:
        if first.numel():
            yield 0, tuple(tensor.contiguous().view(-1) for tensor in tensors)
        return
    row = first.numel() // len(first)
    # Rows that are longer than a chunk are cut themselves; shorter ones are taken several at a time.
    step = max(1, size // row)
    for start in range(0, len(first), step):
        block = [tensor[start : start + step] if row <= size else tensor[start] for tensor in tensors]
        for within, pieces in chunks(*block):
            yield start * row + within, pieces


def same_words(got: Tensor, want: Tensor) -> bool:
    """Whether two flat pieces are bitwise the same. Stops at the first difference.

    Compared as integers of 8 bytes, three times as fast as the numbers themselves.
    """
    if got.dtype != want.dtype or got.is_complex():
        return False
    bytes_ = (got.nbytes, got.storage_offset() * got.element_size(), want.storage_offset() * want.element_size())
    word = next(word for width, word in WORDS if not any(count % width for count in bytes_))
    return torch.equal(got.view(word), want.view(word))


def furthest_from_zero(values: Tensor) -> float:
    """max|x| of a piece that is not empty: NaN or infinite where it holds such elements, or cannot tell."""
    if values.is_complex() or (values.is_floating_point() and values.dtype not in EXACT):
        return math.nan
    # One after the other, while the piece is in the cache: aminmax takes three times as long as both.
    least, most = float(values.amin()), float(values.amax())
    # Of NaN both are NaN, but max() may lose one.
    return max(abs(least), abs(most)) if least == least else math.nan


class Differences:
    """The largest difference of floating tensors, chunk by chunk, in room of its own for one chunk.

    Differences are taken in float64 where a side has it, else in float32, in a third of the time. Rounding to float32
    keeps the order: what rounds to less is less. So only what rounds to the largest seen so far is computed again in
    float64, and the result is that of float64 throughout. (What is not finite in float32 tells nothing.)
    """

    def __init__(self, got: Tensor, want: Tensor) -> None:
        """For the chunks of these two."""
        self.possible = got.dtype in EXACT and want.dtype in EXACT
        double = torch.float64 in (got.dtype, want.dtype)
        self._dtype = torch.float64 if double else torch.float32
        self._same = got.dtype == want.dtype == self._dtype
        self._share = max(SINGLE_EPS / torch.finfo(side.dtype).eps for side in (got, want)) if self.possible else 1.0
        size = CHUNK_BYTES // max(got.element_size(), want.element_size())
        self._room = torch.empty(min(size, want.numel()) if self.possible else 0, dtype=self._dtype)

    def rounded(self, got: Tensor, want: Tensor) -> float:
        """max|got - want| of a chunk, rounded once; NaN or infinite where any of it is not finite or overflows."""
        differences = self._room[: got.numel()]
        if self._same:
            torch.sub(got, want, out=differences)
        else:
            differences.copy_(got).sub_(want)
        return _most(differences)

    def exact(self, got: Tensor, want: Tensor, rounded: float) -> float:
        """The same, not rounded; `rounded` is what that was, and finite.

        A difference of numbers of p bits is a multiple of the smaller one's last bit, and float32 has 24: it is rounded
        only if the smaller one is not 0 and less than 2**(p - 24) times as large. Where no element is, nothing was.
        """
        if self._dtype is torch.float64:
            return rounded
        limit = 2 * self._share * rounded
        # In float32 the larger one of such a pair is less than twice the difference, so that one side tells of both.
        near = self._smaller_than(2 * limit, want) if self._share == 1 else self._smaller_than(limit, got, want)
        if not bool(near.any()):
            return rounded
        cut = near.numel()
        here = _most(wide(got.view(cut, -1)[near]) - wide(want.view(cut, -1)[near]))
        if here >= rounded or bool(near.all()):
            return here
        self.rounded(got, want)
        differences = self._room[: got.numel()].view(cut, -1)
        return max(here, _most(differences[~near]))

    def _smaller_than(self, limit: float, *sides: Tensor) -> Tensor:
        """Which rows of a chunk hold a number other than 0 of at most `limit` on any of these sides."""
        found = torch.zeros(1, dtype=torch.bool)
        for side in sides:
            sizes = self._room[: side.numel()].copy_(side).abs_()
            least = float(sizes.amin())
            if least > limit:
                continue
            if least == 0:
                sizes.masked_fill_(sizes == 0, math.inf)
            rows = sizes.view(-1, ROW) if side.numel() % ROW == 0 else sizes.view(1, -1)
            found = found | (rows.amin(1) <= limit)
        return found

    def rounding(self, difference: float) -> float:
        """What `rounded` would make of this one difference."""
        return float(torch.tensor(difference, dtype=torch.float64).to(self._dtype))


def _most(differences: Tensor) -> float:
    # One after the other they take a third of aminmax's time. NaN, if anywhere, is in both.
    return max(float(differences.amax()), -float(differences.amin()))
