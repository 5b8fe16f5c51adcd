"""What a trace is to whoever compares: records, and the tensor of each when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from shardproof.trace.record import Record


class Trace(Protocol):
    """What one rank showed, wherever it is kept: in one file of a check, in a recording, or put together from others.

    Tensors are read one by one, when they are asked for.
    """

    @property
    def records(self) -> Sequence[Record]:
        """In the order in which they were made; the number of a record is its place here."""
        ...

    @property
    def by_key(self) -> Mapping[tuple[int, str, str, str], Sequence[int]]:
        """Key -> numbers of its records, in the order in which they were made; those that are `unknown` left out."""
        ...

    def tensor(self, number: int) -> Tensor:
        """The tensor of record `number`."""
        ...


def numbers_by_key(records: Sequence[Record]) -> dict[tuple[int, str, str, str], list[int]]:
    """Key -> numbers of its records, in the order in which they were made; those that are `unknown` left out."""
    found: dict[tuple[int, str, str, str], list[int]] = {}
    for number, record in enumerate(records):
        if not record.unknown:
            found.setdefault(record.key, []).append(number)
    return found
