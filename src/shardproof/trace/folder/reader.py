"""Reads a recording: the traces of all its ranks, checked line by line, tensors as views of mapped files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from shardproof.errors import TraceError
from shardproof.trace.folder import index
from shardproof.trace.folder.header import VERSION, WrongVersion, read_header
from shardproof.trace.folder.index import Index
from shardproof.trace.folder.line import SKETCH_SHAPE, STATS_FIELDS, Invalid, Kept
from shardproof.trace.folder.mapped import Pages
from shardproof.trace.folder.names import data_name, index_files, index_name
from shardproof.trace.folder.usual import Usual, numbers
from shardproof.trace.folder.within import size_within
from shardproof.trace.record import Record
from shardproof.trace.stats import Stats
from shardproof.trace.trace import numbers_by_key

SHOWN_FILES = 5
"""Files that an error lists of a folder that is no recording."""


class RankTrace:
    """What one rank showed: as `trace.file.Trace`, and possibly only in part.

    The index is read when something of it is first asked for, and not again.
    """

    def __init__(self, folder: Path, rank: int, pages: Pages, usual: Usual | None = None) -> None:
        """Reads the header. Raises `Invalid`, `WrongVersion` and `OSError`; `open_recording` tells them apart."""
        self.folder, self.rank = folder, rank
        self._pages, self._usual = pages, usual or Usual()
        self._data: dict[int, Path] = {}
        self._words: dict[int, np.ndarray] = {}
        self._path = folder / index_name(rank)
        size_within(folder, self._path)
        with self._path.open("rb") as file:
            header, self.world_size = read_header(file, rank)
        self.header: Mapping[str, Any] = MappingProxyType(header)
        """The header's fields, `about` of the writer among them."""

    @cached_property
    def _index(self) -> Index:
        try:
            size_within(self.folder, self._path)
            with self._path.open("rb") as file:
                file.readline(index.LONGEST_LINE)
                return index.read(file, self.world_size, self._size_of, self._usual)
        except (OSError, Invalid) as error:
            return Index(problem=f"the index can no longer be read: {error}")

    @cached_property
    def records(self) -> tuple[Record, ...]:
        """Every record that can be read, in the order in which the rank made them."""
        return tuple(self._index.records)

    @cached_property
    def events(self) -> tuple[Mapping[str, Any], ...]:
        """What happened between records, in order: each with the field `event`, its kind, and its facts."""
        return tuple(MappingProxyType(event) for event in self._index.events)

    @cached_property
    def undone(self) -> frozenset[int]:
        """Numbers of the records of attempts at a step that came to nothing: a gradient scaler skipped the step.

        What the step did in the end stands behind them, under the same keys.
        """
        skipped = [
            (event.get("step"), before)
            for event, before in zip(self.events, self._index.behind, strict=True)
            if event["event"] == "skipped"
        ]
        return frozenset(
            number for step, before in skipped for number in range(before) if self.records[number].step == step
        )

    @property
    def complete(self) -> bool:
        """Whether the rank came to the end of its recording, and all of it can be read."""
        return self._index.closed

    @property
    def problems(self) -> tuple[str, ...]:
        """What keeps the trace from being complete, and how much of it is read all the same."""
        found = self._index
        if not found.problem:
            return ()
        number = len(found.records)
        read = "1 record is read" if number == 1 else f"{number} records are read"
        return (f"rank {self.rank}: {found.problem}; {read}",)

    @cached_property
    def by_key(self) -> dict[tuple[int, str, str, str], list[int]]:
        """Key -> numbers of its records, in the order in which they were made; those that are `unknown` left out."""
        return numbers_by_key(self.records)

    def shape(self, number: int) -> tuple[int, ...]:
        """Shape of the tensor of record `number` as the rank held it; () where there was none."""
        return self.kept(number).shape

    def dtype(self, number: int) -> torch.dtype | None:
        """Dtype of the tensor of record `number`; None where there was none."""
        return self.kept(number).dtype

    def depth(self, number: int) -> Literal["full", "sketch", "stats"] | None:
        """How much is kept of the tensor of record `number`; None where there was none."""
        return self.kept(number).depth  # type: ignore[return-value]  # one of DEPTHS

    def size_bytes(self, number: int) -> int:
        """Bytes of data that are kept of record `number`: of its values, or of its sketch."""
        return self.kept(number).bytes

    def tensor(self, number: int) -> Tensor:
        """The values of record `number`: a view of the file, to be read only.

        Raises `TraceError` where no values were kept, or the file has changed since.
        """
        kept = self.kept(number)
        if kept.depth != "full" or kept.dtype is None:
            raise self._not_kept(number, "values", "full")
        return self._read(kept, kept.dtype, kept.shape)

    def sketch(self, number: int) -> Tensor:
        """The sketch of record `number`, shape (16, 16), to be read only. Raises `TraceError` where it has none."""
        kept = self.kept(number)
        if kept.sketch_dtype is None:
            raise self._not_kept(number, "sketch", "sketch")
        return self._read(kept, kept.sketch_dtype, SKETCH_SHAPE)

    def keyed(self, number: int) -> Literal["index", "samples"] | None:
        """What the rows of record `number`'s sketch are drawn by; None where it has no sketch."""
        return self.kept(number).keyed  # type: ignore[return-value]  # one of KEYED

    def stats(self, number: int) -> Stats:
        """The statistics of record `number`. Raises `TraceError` where none were kept, or no tensor has such."""
        text = self._index.stats[number]
        held = self.kept(number).stats if text is None else numbers(text)
        if held is None:
            raise self._not_kept(number, "statistics", "stats")
        try:
            return Stats.from_dict(dict(zip(STATS_FIELDS, held, strict=True)))
        except ValueError as error:
            raise TraceError(f"{self.folder}: rank {self.rank}, record {number}: {error}") from None

    def kept(self, number: int) -> Kept:
        """What is kept of the tensor of record `number`, and where; for statistics ask `stats`."""
        return self._index.kept[number]

    def words(self, kept: Kept) -> np.ndarray:
        """The bytes of a record that has some, uint8: what `tensor` and `sketch` give, for whoever reads very many.

        Raises `TraceError` where the file has changed since.
        """
        words = self._words.get(kept.file)
        if words is None or kept.at + kept.bytes > len(words):
            words = self._words[kept.file] = self._mapped(kept).numpy()
        else:
            self._pages.touch(kept.bytes)
        return words[kept.at : kept.at + kept.bytes]

    def _read(self, kept: Kept, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        return self._mapped(kept)[kept.at : kept.at + kept.bytes].view(dtype).view(shape)

    def _mapped(self, kept: Kept) -> Tensor:
        """The file in which a record's data lie, uint8."""
        path = self._data.get(kept.file)
        if path is None:
            path = self._data[kept.file] = self.folder / data_name(self.rank, kept.file)
        try:
            return self._pages.read(path, kept.at, kept.bytes)
        except OSError as error:
            raise TraceError(f"{self.folder}: rank {self.rank} changed while it was read: {error}") from error

    def _size_of(self, file: int) -> int:
        return size_within(self.folder, self.folder / data_name(self.rank, file))

    def _not_kept(self, number: int, wanted: str, depth: str) -> TraceError:
        record, kept = self.records[number], self.kept(number)
        what = f"depth {kept.depth}" if kept.depth else "nothing, as there was no tensor"
        return TraceError(
            f"{self.folder}: rank {self.rank} keeps no {wanted} of step {record.step}, {record.stage}, {record.name}: "
            f"it was recorded with {what}; record with depth {depth}"
        )


class Recording:
    """A recorded run, as far as it can be read. `open_recording` makes it."""

    def __init__(
        self, path: Path, world_size: int, ranks: Mapping[int, RankTrace], unreadable: tuple[str, ...]
    ) -> None:
        self.path, self.world_size = path, world_size
        self.ranks: Mapping[int, RankTrace] = MappingProxyType(dict(sorted(ranks.items())))
        """Rank -> its trace, for every rank that can be read."""
        self._unreadable = unreadable

    @property
    def missing(self) -> tuple[int, ...]:
        """Ranks of the run of which nothing can be read."""
        return tuple(rank for rank in range(self.world_size) if rank not in self.ranks)

    @property
    def complete(self) -> bool:
        """Whether every rank of the run came to the end of its recording, and all of it can be read."""
        return not self._unreadable and not self.missing and all(trace.complete for trace in self.ranks.values())

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with the recording, a sentence each: the folder's problems first, then each rank's.

        Reads the index of every rank.
        """
        return (*self._unreadable, *(problem for trace in self.ranks.values() for problem in trace.problems))


def open_recording(path: str | Path) -> Recording:
    """The recording in the directory `path`. Reads headers only; the rest when it is asked for.

    Raises `TraceError` where there is none, it is of another version, or no rank of it can be read. A rank that cannot
    be read, or not to its end, is told in `problems`.
    """
    path = Path(path)
    pages, usual = Pages(), Usual()
    ranks: dict[int, RankTrace] = {}
    problems: list[str] = []
    for rank, _ in _found(path):
        try:
            ranks[rank] = RankTrace(path, rank, pages, usual)
        except WrongVersion as error:
            raise TraceError(
                f"{path}: rank {rank} is a trace of version {error.version}; this shardproof reads version "
                f"{VERSION}: read it with the shardproof that wrote it, or record the run again"
            ) from None
        except (Invalid, OSError) as error:
            problems.append(f"rank {rank}: {index_name(rank)} cannot be read: {error}")
    if not ranks:
        raise TraceError(f"{path}: no rank of the recording can be read:\n  " + "\n  ".join(problems))
    # Rank 0 clears away what an earlier run of more ranks left, so that its word counts most.
    first = min(ranks)
    world_size = ranks[first].world_size
    for rank in [rank for rank, trace in ranks.items() if trace.world_size != world_size]:
        other = ranks.pop(rank).world_size
        problems.append(
            f"rank {rank}: is of a run of {other} ranks, rank {first} of one of {world_size}; it is left out"
        )
    if missing := sum(1 for rank in range(world_size) if rank not in ranks):
        problems.insert(0, _missing(missing, world_size, ranks))
    return Recording(path, world_size, ranks, tuple(problems))


def _missing(missing: int, world_size: int, ranks: Mapping[int, RankTrace]) -> str:
    first = [str(rank) for rank in range(world_size) if rank not in ranks][:8]
    more = ", ..." if missing > len(first) else ""
    return f"nothing can be read of {missing} of {world_size} ranks: {', '.join(first)}{more}"


def _found(path: Path) -> list[tuple[int, Path]]:
    """The index files of a directory. Raises `TraceError` for anything else."""
    try:
        if path.is_file():
            raise TraceError(f"{path} is a file; a recording is a directory, perhaps {path.resolve().parent}")
        found = list(index_files(path))
        held = sorted(entry.name for entry in path.iterdir())
    except FileNotFoundError:
        raise TraceError(f"{path} does not exist; give the directory that was recorded to") from None
    except OSError as error:
        raise TraceError(f"{path} cannot be read as a recording: {error}") from None
    if not found:
        shown = ", ".join(ascii(name)[1:-1] for name in held[:SHOWN_FILES]) + (", ..." * (len(held) > SHOWN_FILES))
        raise TraceError(
            f"{path} holds no recording: it has no {index_name(0)}, "
            + (f"only {shown}" if held else "and nothing else either")
        )
    return found
