"""The tensors whose numbers were made last: a module that hands on what its last child returned shows it once more."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.parallel.piece import Piece
from shardproof.trace.stats import Stats, has_sum

LATELY = 4
"""Tensors that are remembered: parents hand on the output of a child at once."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """What was made of a tensor, where nothing but statistics and a sketch is kept."""

    stats: Stats
    rows: Tensor | None
    """The sketch; None where there are statistics alone."""


@dataclass(frozen=True, slots=True)
class _Seen:
    tensor: weakref.ref[Tensor]
    """The object itself, which is not kept alive: once it is gone, its address may be another's."""

    state: tuple[Any, ...]
    numbers: Numbers


class Lately:
    """Numbers of plain tensors on the CPU, found again while the tensor is the same object and was not written to."""

    def __init__(self) -> None:
        self._seen: deque[_Seen] = deque(maxlen=LATELY)

    def find(self, tensor: Tensor, piece: Piece | None, samples: Sequence[str] | None, depth: str) -> Numbers | None:
        """The numbers of `tensor` at this place and depth, if they were put here lately."""
        for seen in self._seen:
            if seen.tensor() is not tensor or seen.state != _state(tensor, piece, samples, depth):
                continue
            # Who writes through `.data` or NumPy leaves the version as it was. The sum costs little beside the rest.
            if has_sum(tensor, seen.numbers.stats.sum):
                return seen.numbers
        return None

    def put(
        self, tensor: Tensor, piece: Piece | None, samples: Sequence[str] | None, depth: str, numbers: Numbers
    ) -> None:
        """Remember the numbers of `tensor`, unless its kind does not tell whether it was changed."""
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        if plain and tensor.device.type == "cpu" and not tensor.is_complex() and not tensor.is_inference():
            self._seen.append(_Seen(weakref.ref(tensor), _state(tensor, piece, samples, depth), numbers))


def _state(tensor: Tensor, piece: Piece | None, samples: Sequence[str] | None, depth: str) -> tuple[Any, ...]:
    where = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor._version)
    return (*where, piece, None if samples is None else tuple(samples), depth)
