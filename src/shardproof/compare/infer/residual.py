"""How far pieces lie from where a reading puts them, chunk by chunk: no copy in float64 of everything at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shardproof.compare.measure import MULTIPLE, furthest, wide, within

EXACT = (torch.float32, torch.float64)
"""Dtypes in which a difference is not rounded by more than a part in 10 million of itself."""

CHUNK = 1 << 17
"""Elements that are held in float64 at a time: they stay in a core's cache."""


def chunks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, length) along dim 0, of about `CHUNK` elements each."""
    row = math.prod(shape[1:])
    length = max(CHUNK // max(row, 1), 1)
    for start in range(0, shape[0], length):
        yield start, min(length, shape[0] - start)


def error_of(got: Sequence[Tensor], want: Tensor, weight: float = 1.0, limit: float = math.inf) -> float:
    """max|weight * sum of `got` - want|; NaN where one of them is NaN.

    An answer beyond `limit` may be too small: it is given as soon as it is beyond.
    """
    if not want.dim():
        return error_of([one.reshape(1) for one in got], want.reshape(1), weight, limit)
    error = 0.0
    for start, length in chunks(want.shape):
        parts = [one.narrow(0, start, length) for one in got]
        total = parts[0] if len(parts) == 1 and weight == 1.0 else _total(parts) * weight
        error = _larger(error, _far(total, want.narrow(0, start, length)))
        if not error <= limit:
            break
    return error


def error_at(got: Tensor, whole: Tensor, dim: int, index: Tensor, limit: float = math.inf) -> float:
    """max|got - the places `index` of `whole` along `dim`|, as `error_of`."""
    error = 0.0
    each = max(CHUNK // max(got.numel() // max(len(index), 1), 1), 1)
    for start in range(0, len(index), each):
        some = index[start : start + each]
        error = _larger(error, _far(got.narrow(dim, start, len(some)), whole.index_select(dim, some)))
        if not error <= limit:
            break
    return error


def _far(got: Tensor, want: Tensor) -> float:
    """`furthest`, in the tensors' own precision where that is enough: near numbers differ by an exact number."""
    if got.numel() and got.dtype in EXACT and want.dtype in EXACT:
        far = float(torch.sub(got, want).abs_().max())
        if math.isfinite(far):
            return far
    return furthest(got, want)


def floors(error: float, floor: float) -> float:
    """An error in units of the noise floor."""
    if error == 0:
        return 0.0
    return error / floor if floor > 0 else error * math.inf


def acceptable(floor: float) -> float:
    """The largest error that rounding can have made."""
    return MULTIPLE * floor


def largest_of(errors: Sequence[float]) -> float:
    """The largest, NaN if one is."""
    error = 0.0
    for one in errors:
        error = _larger(error, one)
    return error


def all_within(got: Tensor, want: Tensor, floor: float) -> bool:
    """Whether two tensors are equal but for rounding."""
    return within(error_of([got], want, limit=acceptable(floor)), floor)


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = wide(parts[0]).clone()
    for part in parts[1:]:
        total += part
    return total


def _larger(first: float, second: float) -> float:
    # max() alone could lose a NaN.
    return second if second != second or (second > first and first == first) else first


def extremes(tensor: Tensor) -> tuple[float, float]:
    """The smallest and the largest element, (0, 0) of an empty tensor; NaN where one is NaN."""
    if not tensor.numel():
        return 0.0, 0.0
    low, high = torch.aminmax(tensor.float() if tensor.dtype in (torch.bool, torch.bfloat16, torch.half) else tensor)
    return float(low), float(high)
