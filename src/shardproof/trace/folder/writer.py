"""Writes what one rank shows to its files of a recording, while the run goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch import Tensor

from shardproof.errors import TraceError, UsageError
from shardproof.parallel import piece
from shardproof.parallel.held import plain
from shardproof.parallel.piece import Piece
from shardproof.trace.folder.dtypes import NAMES
from shardproof.trace.folder.header import MOST_RANKS, VERSION
from shardproof.trace.folder.lately import Lately, Numbers
from shardproof.trace.folder.line import (
    DEEPEST,
    DEPTHS,
    KNOWN_STAGES,
    LONGEST_NAME,
    STATS_FIELDS,
    Invalid,
    Kept,
    checked,
    dumps,
    inside,
    jsonable,
    record_line,
)
from shardproof.trace.folder.names import data_name, files_of_ranks, index_name
from shardproof.trace.folder.safetensors_file import GrowingFile, write
from shardproof.trace.record import Record
from shardproof.trace.stats import Stats, sketch_and_stats, stats_of

Depth = Literal["full", "sketch", "stats"]

FLUSH_RECORDS = 64
"""Lines that wait in memory at most: what a killed run loses."""

FLUSH_S = 1.0
"""Seconds after which the next record takes the waiting lines along."""

HEADER_BYTES = 128 * 2**10
"""Room for the header of a rank's first data file: some six hundred tensors."""

LARGEST_HEADER_BYTES = 16 * 2**20
"""Each further file has four times the room of the one before it, up to this. safetensors reads up to 100 MB."""

_IN_ORDER: Callable[[Stats], tuple[int | float, ...]] = attrgetter(*STATS_FIELDS)

_COMPLEX = {torch.complex64, torch.complex128}


class Writer:
    """One rank's part of a recording: an index, and safetensors files with what is kept of the tensors.

    Data are written first, then the line that speaks of them, so that a run may be killed at any time. Nothing is
    forced down to the disk: this stands in the way of the training loop, and a machine that loses its power loses the
    run as well. Not for several threads at once.

    After an error of the file system, which is raised once, the writer does nothing more.
    """

    def __init__(
        self, folder: Path, rank: int, world_size: int, about: Mapping[str, object], *, overwrite: bool = False
    ) -> None:
        """`about` stands in the header: plain data. The folder is made where it is missing.

        Raises `UsageError` where the folder holds a trace of this rank already, and `TraceError` where it cannot be
        written. `overwrite` removes this rank's files first; rank 0 removes those of ranks from `world_size` on.
        """
        if not 0 <= rank < world_size <= MOST_RANKS:
            raise UsageError(f"{folder}: there is no rank {rank} among {world_size}")
        self.folder, self.rank, self.world_size = Path(folder), rank, world_size
        header = self._first_line(about)
        self._lines: list[bytes] = []
        self._records = 0
        self._safe = 0
        self._written = 0
        self._index = -1
        self._size = 0
        self._data: GrowingFile | None = None
        self._files = 0
        self._room = HEADER_BYTES
        self._over = False
        self._lately = Lately()
        self._flushed_s = time.monotonic()
        try:
            self._make_room(overwrite=overwrite)
            self._index = os.open(self.folder / index_name(rank), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._lines.append(header)
            self._flush_lines()
        except FileExistsError as error:
            self._over = True
            raise UsageError(f"{error.filename or folder} exists; give another directory") from None
        except OSError as error:
            self._fail(error, len(header))

    @property
    def records(self) -> int:
        """Records so far."""
        return self._records

    def write(
        self, record: Record, tensor: Tensor | None, *, depth: Depth, samples: Sequence[str] | None = None
    ) -> None:
        """Keep a record and, of its tensor, as much as `depth` says; None where there is no tensor.

        The tensor may lie on any device, and may be changed as soon as this returns. A complex one is kept as pairs of
        reals along a new last dim, a sparse one dense, of a DTensor the local part. `samples` are the digests of the
        micro-batch's samples where dim 0 is the batch: a sketch's rows are then drawn by them.

        A tensor that cannot be kept (a dtype that no file knows, a shape that is not its piece's) is `unknown`.
        """
        if self._over:
            return
        _check(record, depth)
        kept = Kept()
        if tensor is None or record.unknown:
            record = replace(record, missing=not record.unknown, piece=None if record.unknown else record.piece)
        else:
            record, local = _as_kept(replace(record, missing=False) if record.missing else record, tensor.detach())
            if local is not None:
                kept = self._kept(record, local, depth, samples, tensor)
        self._lines.append(record_line(record, kept))
        self._records += 1
        if len(self._lines) >= FLUSH_RECORDS or time.monotonic() - self._flushed_s > FLUSH_S:
            self._safely_flush()

    def event(self, kind: str, **facts: object) -> None:
        """Note that something happened between two records; `facts` are plain data. All lines are flushed."""
        if self._over:
            return
        if not kind or kind == "closed" or "event" in facts:
            raise UsageError(f"event {kind!r}: needs a name of its own")
        self._lines.append(dumps({"event": kind, **_plain(f"event {kind}", facts)}))
        self._safely_flush()

    def flush(self) -> None:
        """Write the waiting lines and the header of the data: for the end of a step."""
        if not self._over:
            self._safely_flush(header=True)

    def close(self) -> None:
        """Say that the recording is complete, and close its files. Closing twice does nothing."""
        if self._over:
            return
        self._lines.append(dumps({"event": "closed", "records": self._records}))
        self._safely_flush(header=True)
        if not self._over:
            self._end()

    # What is kept of a tensor.

    def _kept(self, record: Record, local: Tensor, depth: Depth, samples: Sequence[str] | None, given: Tensor) -> Kept:
        """`local` is what is kept of `given`, the very object that the run holds."""
        shape = tuple(local.shape)
        if depth == "full":
            file, at, size = self._append(record, local, "")
            return Kept("full", shape, local.dtype, file, at, size)
        found = self._lately.find(given, record.piece, samples, depth)
        if found is None:
            rows, stats = (
                sketch_and_stats(local, record.piece, samples) if depth == "sketch" else (None, stats_of(local))
            )
            found = Numbers(stats, rows)
            self._lately.put(given, record.piece, samples, depth, found)
        rows, numbers = found.rows, _IN_ORDER(found.stats)
        if rows is None:
            return Kept("stats", shape, local.dtype, stats=numbers)
        file, at, size = self._append(record, rows, " sketch")
        keyed = "index" if samples is None else "samples"
        return Kept("sketch", shape, local.dtype, file, at, size, keyed, rows.dtype, numbers)

    def _append(self, record: Record, tensor: Tensor, kind: str) -> tuple[int, int, int]:
        """File, first byte and bytes of a tensor that has been written."""
        part = f" {record.part}" if record.part else ""
        name = f"{self._records}{kind} {record.stage} {record.name}{part}".encode("utf-8", "replace").decode()
        content = _content(tensor)
        try:
            data = self._file_with_room(name)
            at = data.append(name, tensor.dtype, tuple(tensor.shape), content)
        except OSError as error:
            self._fail(error, content.nbytes)
        self._written += content.nbytes
        return self._files - 1, at, content.nbytes

    def _file_with_room(self, name: str) -> GrowingFile:
        if self._data is None or not self._data.has_room(name):
            if self._data is not None:
                data, self._data = self._data, None
                data.close()
                self._room = min(4 * self._room, LARGEST_HEADER_BYTES)
            path = self.folder / data_name(self.rank, self._files)
            about = {"shardproof": "trace", "rank": str(self.rank), "file": str(self._files)}
            self._data = GrowingFile(path, self._room, about)
            self._files += 1
        return self._data

    # Files.

    def _first_line(self, about: Mapping[str, object]) -> bytes:
        own = {"shardproof": "trace", "version": VERSION, "rank": self.rank, "world_size": self.world_size}
        if taken := sorted(own.keys() & about.keys()):
            raise UsageError(f"{self.folder}: about holds {', '.join(taken)}, which the header itself says")
        return dumps(own | _plain("about", about))

    def _make_room(self, *, overwrite: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for rank, path in files_of_ranks(self.folder):
            if overwrite and (rank == self.rank or (self.rank == 0 and rank >= self.world_size)):
                path.unlink(missing_ok=True)
            elif rank == self.rank:
                raise UsageError(
                    f"{self.folder} holds a recording of rank {rank} already ({path.name}); "
                    "give another directory, or overwrite=True"
                )

    def _safely_flush(self, *, header: bool = False) -> None:
        waiting = sum(map(len, self._lines))
        try:
            self._flush_lines()
            if header and self._data is not None:
                self._data.fill()
        except OSError as error:
            self._fail(error, waiting)

    def _flush_lines(self) -> None:
        text = b"".join(self._lines)
        try:
            write(self._index, text, self._size)
        except OSError:
            # Half a line would be read as the sign of a kill.
            os.ftruncate(self._index, self._size)
            raise
        self._lines.clear()
        self._size += len(text)
        self._safe = self._records
        self._written += len(text)
        self._flushed_s = time.monotonic()

    def _fail(self, error: OSError, size: int) -> NoReturn:
        """Keep what can be kept, and raise the one error."""
        # Where the disk is still full, the first error has said so.
        with suppress(OSError):
            if self._index >= 0:
                self._flush_lines()
        with suppress(OSError):
            self._end()
        raise TraceError(
            f"{self.folder}: rank {self.rank} could not write {size} bytes, after {self._written} bytes and "
            f"{self._safe} records: {error}. What was written stays readable. Make room, or give another directory; "
            "fewer steps or names, or what='sketch', take less"
        ) from error

    def _end(self) -> None:
        """Close the files."""
        self._over = True
        index, self._index = self._index, -1
        data, self._data = self._data, None
        try:
            if data is not None:
                data.close()
        finally:
            if index >= 0:
                os.close(index)


def _check(record: Record, depth: str) -> None:
    if depth not in DEPTHS:
        raise UsageError(f"depth {depth!r}: give one of {', '.join(DEPTHS)}")
    if record.stage not in KNOWN_STAGES:
        raise UsageError(f"stage {record.stage!r} of {record.name}: not one of {', '.join(sorted(KNOWN_STAGES))}")
    if not record.name or max(len(record.name), len(record.part)) > LONGEST_NAME:
        raise UsageError(f"{record.stage}: a name has from 1 to {LONGEST_NAME} characters, not {len(record.name)}")


def _as_kept(record: Record, tensor: Tensor) -> tuple[Record, Tensor | None]:
    """The record and its tensor in the one form that is kept: local, dense, complex as pairs of reals.

    Without the tensor where it cannot be kept; the record is then `unknown`.
    """
    local = plain(tensor)
    if local.layout is not torch.strided:
        local = local.to_dense()
    if local.dtype in _COMPLEX:
        if record.piece is not None and record.piece.local_shape == tuple(local.shape):
            record = replace(record, piece=record.piece.as_real())
        local = torch.view_as_real(local.resolve_conj())
    local = local.resolve_neg()
    if not _fits(record.piece, local) and record.piece is not None and not record.piece.declared:
        # Where a plain tensor lies is assumed, and of one larger than the model says (padded) wrongly so.
        record = replace(record, piece=piece.whole(local.shape))
    if local.dtype not in NAMES or local.is_meta or not _fits(record.piece, local):
        return replace(record, unknown=True, piece=None), None
    return record, local


def _fits(where: Piece | None, local: Tensor) -> bool:
    if where is None:
        return True
    return where.local_shape == tuple(local.shape) and inside(where.whole, where.offset, where.shape)


def _content(tensor: Tensor) -> memoryview:
    """The bytes of a tensor where they lie, without a copy where it is on the CPU and contiguous."""
    # As bytes, not numbers: bfloat16 has no NumPy type.
    # Strided anew, as a single element may have any stride and be called contiguous all the same.
    dense = tensor.detach().cpu().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
    content: memoryview = flat.numpy().data
    return content


def _plain(what: str, facts: Mapping[str, object]) -> dict[str, object]:
    try:
        found: dict[str, object] = jsonable(facts)
        # What no reader would take: one deep fact would end all that is read.
        checked(found, DEEPEST - 1)
    except (TypeError, Invalid) as error:
        raise UsageError(f"{what}: {error}") from None
    return found
