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


Key = tuple[int, str, str, str]


def numbers_by_key(records: Sequence[Record]) -> dict[Key, list[int]]:
    """Key -> numbers of its records, in the order in which they were made; those that are `unknown` left out."""
    found: dict[Key, list[int]] = {}
    for number, record in enumerate(records):
        if not record.unknown:
            found.setdefault(record.key, []).append(number)
    return found


class Alike:
    """Makes what `numbers_by_key` makes, and the same of ranks that show the same: most do, of hundreds."""

    def __init__(self) -> None:
        self._keys: list[Key | None] = []
        self._found: Mapping[Key, Sequence[int]] = {}

    def numbers_by_key(self, records: Sequence[Record]) -> Mapping[Key, Sequence[int]]:
        """As the function, or what it gave for the rank before, where that had the same keys."""
        keys = [None if record.unknown else record.key for record in records]
        if keys != self._keys:
            self._keys, self._found = keys, numbers_by_key(records)
        return self._found
