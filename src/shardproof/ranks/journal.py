"""The last collectives of a rank, in memory that its supervisor reads even when the rank is dead."""

from __future__ import annotations

import mmap
import struct
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

SLOTS = 512
"""Calls that are kept: what went wrong lies among the last ones."""
_SLOT_BYTES = 1024
_TEXT_BYTES = _SLOT_BYTES - 2
_PATH_CHARS = 500
_DETAIL_CHARS = 200
_SEPARATOR = "\x1f"
_COUNT = struct.Struct("<Q")
_LENGTH = struct.Struct("<H")
_HEAD_BYTES = 64


@dataclass(frozen=True, slots=True)
class Spot:
    """A line of the user's code."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Call:
    """One collective, as one rank called it."""

    group: str
    """Name of its process group, the same on all of its ranks."""
    axis: str
    """Mesh axis of the group, or nothing."""
    ranks: tuple[int, ...]
    """Ranks of the group."""
    number: int
    """How many there were on this group before."""
    name: str
    """As `all_reduce`."""
    details: str
    """As `SUM of float32 [4]`."""
    same: str
    """What has to be the same on all ranks of the group."""
    sizes: str
    """What mostly has to be: some backends gather pieces of several sizes."""
    spot: Spot | None
    """Where the user's code called it; None where none did, as in a backward pass."""


@dataclass(frozen=True, slots=True)
class Tally:
    """All collectives of one rank on one group, in two numbers."""

    ranks: tuple[int, ...]
    count: int
    digest: int


class Journal:
    """Written by one rank, read by its parent. Memory without a name: it ends with the processes."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _HEAD_BYTES + SLOTS * _SLOT_BYTES)
        self._world = ""
        self._tallies: dict[str, Tally] = {}
        self._called: set[str] = set()
        # A signal handler may call a collective while one is being written down.
        self._lock = threading.RLock()

    def enter(self, world: str) -> None:
        """Run by the rank: a new world begins, named alike on all of its ranks."""
        self._world = world

    def note(
        self, group: str, axis: str, ranks: Sequence[int], what: tuple[str, str, str, str], at: Spot | None
    ) -> None:
        """Run by the rank, before the call: `what` is name, details, same and sizes of a `Call`."""
        name, details, same, sizes = what
        with self._lock:
            key = f"{self._world}/{group}"
            before = self._tallies.get(key) or Tally(tuple(ranks), 0, 0)
            number = before.count
            self._tallies[key] = Tally(before.ranks, number + 1, zlib.crc32(same.encode(), before.digest))
            self._called.add(key)
            self._append(
                _SEPARATOR.join(
                    (
                        key,
                        axis,
                        ",".join(map(str, before.ranks)),
                        str(number),
                        name,
                        details[:_DETAIL_CHARS],
                        str(zlib.crc32(same.encode())),
                        str(zlib.crc32(sizes.encode())),
                        *_written(at),
                    )
                )
            )

    def tallies(self) -> dict[str, Tally]:
        """Run by the rank at the end of a call: all that was ever called on the groups that were used in it."""
        with self._lock:
            told = {key: self._tallies[key] for key in self._called}
            self._called.clear()
            # Worlds that have ended are done with.
            self._tallies = {key: of for key, of in self._tallies.items() if key.startswith(f"{self._world}/")}
        return told

    def count(self) -> int:
        """Run by the parent: how many calls there were."""
        return int(_COUNT.unpack_from(self._memory, 0)[0])

    def calls(self, since: int = 0) -> list[Call]:
        """Run by the parent: the last calls, oldest first, without the first `since` that there ever were."""
        count = self.count()
        texts = (self._text(number % SLOTS) for number in range(max(since, count - SLOTS), count))
        return [call for text in texts if (call := _call(text)) is not None]

    def close(self) -> None:
        """Gives the memory back."""
        self._memory.close()

    def _append(self, text: str) -> None:
        count = _COUNT.unpack_from(self._memory, 0)[0]
        self._write(count % SLOTS, text)
        _COUNT.pack_into(self._memory, 0, count + 1)

    def _write(self, slot: int, text: str) -> None:
        start = _HEAD_BYTES + slot * _SLOT_BYTES
        data = text.encode(errors="replace")[:_TEXT_BYTES]
        # Empty while it is being written: the rank may end at any byte.
        _LENGTH.pack_into(self._memory, start, 0)
        self._memory[start + 2 : start + 2 + len(data)] = data
        _LENGTH.pack_into(self._memory, start, len(data))

    def _text(self, slot: int) -> str:
        start = _HEAD_BYTES + slot * _SLOT_BYTES
        length = min(_LENGTH.unpack_from(self._memory, start)[0], _TEXT_BYTES)
        return self._memory[start + 2 : start + 2 + length].decode(errors="replace")


def _written(at: Spot | None) -> tuple[str, str, str]:
    return ("", "0", "") if at is None else (at.file[-_PATH_CHARS:], str(at.line), at.function[-80:])


def _read(fields: Sequence[str]) -> Spot | None:
    if len(fields) != 3 or not fields[0] or not fields[1].isdecimal():
        return None
    return Spot(fields[0], int(fields[1]), fields[2])


def _call(text: str) -> Call | None:
    """None where the rank ended, or user code wrote, in the middle of it."""
    fields = text.split(_SEPARATOR)
    if len(fields) != 11 or not fields[3].isdecimal():
        return None
    group, axis, ranks, number, name, details, same, sizes = fields[:8]
    members = tuple(int(rank) for rank in ranks.split(",") if rank.isdecimal())
    return Call(group, axis, members, int(number), name, details, same, sizes, _read(fields[8:]))
