"""A rank's records as they are compared: under the other recording's names, with places that values will tell."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from shardproof.parallel.names import ROOT
from shardproof.parallel.piece import Piece
from shardproof.spec.stages import STAGES
from shardproof.trace.folder.reader import RankTrace
from shardproof.trace.record import Record
from shardproof.trace.trace import Alike, Trace

Key = tuple[int, str, str, str]

SIGNED = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
"""What stands for the dtypes that torch keeps and does not compute with; the largest numbers stay apart as bits do."""


class Aligned:
    """A rank's trace under other names, with the whole shape put on plain pieces of parameters."""

    def __init__(
        self,
        trace: RankTrace,
        *,
        rename: Callable[[str], str],
        wholes: Mapping[str, tuple[int, ...]],
        alike: Alike | None = None,
    ) -> None:
        """`wholes` are the shapes of parameters on one device, by new name; `alike` knows the ranks before."""
        self.trace = trace
        self._alike = alike or Alike()
        self.records: Sequence[Record] = [
            _placed(record, rename(record.name), wholes) if number not in trace.undone else _undone(record)
            for number, record in enumerate(trace.records)
        ]

    @cached_property
    def by_key(self) -> Mapping[Key, Sequence[int]]:
        """Key -> numbers of its records, in the order in which they were made."""
        return self._alike.numbers_by_key(self.records)

    def tensor(self, number: int) -> Tensor:
        """The tensor of record `number`, in a dtype that torch computes with."""
        tensor = self.trace.tensor(number)
        signed = SIGNED.get(tensor.dtype)
        return tensor if signed is None else tensor.to(signed)

    def unfinished(self, step: int) -> bool:
        """Whether the rank was cut off, or left its loop, within this step."""
        ends = {event.get("event") for event in self.trace.events if event.get("step") == step}
        return "step" not in ends and (step in self._left or (not self.trace.complete and step >= self._last))

    @cached_property
    def _left(self) -> frozenset[object]:
        steps = (event.get("step") for event in self.trace.events if event.get("event") == "unfinished")
        return frozenset(step for step in steps if isinstance(step, int))

    @cached_property
    def _last(self) -> int:
        return max((record.step for record in self.records), default=-1)

    def shape(self, number: int) -> tuple[int, ...]:
        """Shape of the tensor of record `number` as the rank held it, without reading it."""
        return self.trace.shape(number)


class Only:
    """Some of a trace's keys: of the others there is nothing to see, and their numbers stay."""

    def __init__(self, trace: Trace, keys: Collection[Key], *, draws: bool = True) -> None:
        """`draws`: whether to tell where random numbers were drawn."""
        self._trace = trace
        self.records: Sequence[Record] = [
            (record if draws or not record.draws else replace(record, draws=0))
            if record.key in keys
            else replace(record, unknown=True, missing=True, draws=0)
            for record in trace.records
        ]
        self.by_key: Mapping[Key, Sequence[int]] = {
            key: numbers for key, numbers in trace.by_key.items() if key in keys
        }

    def tensor(self, number: int) -> Tensor:
        """The tensor of record `number`."""
        return self._trace.tensor(number)


class Nothing:
    """The trace of a rank that is missing: the other ranks are compared without it."""

    records: Sequence[Record] = ()
    by_key: Mapping[Key, Sequence[int]] = {}

    def tensor(self, number: int) -> Tensor:
        """Raises LookupError: there is none."""
        raise LookupError(f"a missing rank has no record {number}")


def _undone(record: Record) -> Record:
    """Of an attempt at a step that came to nothing: there, so that numbers stay, and not to be looked at."""
    return replace(record, unknown=True, missing=True, draws=0, samples=())


def _placed(record: Record, name: str, wholes: Mapping[str, tuple[int, ...]]) -> Record:
    """A plain tensor is taken for the whole by who records it; where it is smaller, it is a part."""
    if record.stage not in STAGES:
        # What went into a module: a trace may hold it, and two runs owe each other nothing about it.
        return replace(record, name=name, unknown=True, missing=True)
    piece, whole = record.piece, wholes.get(name)
    by_hand = piece is not None and not piece.declared and whole is not None and record.name != ROOT
    if not by_hand or piece is None or whole is None or whole == piece.whole or len(whole) != len(piece.whole):
        return record if name == record.name else replace(record, name=name)
    placed = Piece(whole=whole, offset=(0,) * len(whole), shape=piece.shape, declared=False)
    return replace(record, name=name, piece=placed)
