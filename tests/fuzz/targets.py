"""What reads files of strangers, each as a function of bytes: it reads them, or says in one error that it cannot.

Anything else that is raised is a bug. `test_fuzz_readers.py` runs them for seconds with hypothesis, and
`with_atheris.py` for as long as one likes with libFuzzer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import nn

from shardproof.checkpoint.export import export
from shardproof.checkpoint.load import load_weights, read_extra
from shardproof.checkpoint.save import save
from shardproof.errors import CheckpointError, TraceError
from shardproof.parallel.held import held_parameters
from shardproof.parallel.piece import Piece
from shardproof.report import recorded
from shardproof.trace.folder.reader import open_recording
from shardproof.trace.folder.writer import Writer
from shardproof.trace.record import Record

INDEX, DATA = "rank-00000.jsonl", "rank-00000.safetensors"


@cache
def _folder() -> Path:
    # Memory where there is some: a fuzzer writes thousands of files a second.
    shared = Path("/dev/shm")
    kept = tempfile.TemporaryDirectory(prefix="shardproof-fuzz-", dir=shared if shared.is_dir() else None)
    _kept.append(kept)
    return Path(kept.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []
"""Removed when the process ends."""


@cache
def recording() -> Path:
    """A small recording with records of every kind."""
    folder = _folder() / "recording"
    writer = Writer(folder, 0, 1, {"what": "full"})
    half = Piece(whole=(8, 3), offset=(4, 0), shape=(4, 3), pending=(("sum", (0,)),))
    weight = torch.linspace(-1, 1, 12).reshape(4, 3)
    writer.event("layout", axes={"tp": 1})
    writer.write(Record(step=-1, stage="initial-state", name="fc.weight", piece=half), weight, depth="full")
    writer.write(Record(step=0, stage="batch", name="(root)", samples=("0a", "0b")), weight[:2], depth="full")
    writer.write(Record(step=0, stage="forward", name="fc", draws=7), weight, depth="sketch")
    writer.write(Record(step=0, stage="update", name="fc.weight"), weight / 0, depth="stats")
    writer.write(Record(step=0, stage="gradient", name="fc.weight", missing=True), None, depth="full")
    writer.close()
    return folder


@cache
def checkpoint() -> Path:
    """A small checkpoint."""
    folder = _folder() / "step-00000001"
    model = nn.Linear(3, 2)
    save(folder, model, list(held_parameters(model)), None, {"step": 1, "rates": (0.5,), 3: float("nan")})
    return folder


def _read_recording(folder: Path) -> None:
    with suppress(TraceError):
        found = open_recording(folder)
        lines = [*recorded.summary(found)]
        for stats in (False, True):
            with suppress(TraceError, recorded.UsageError):
                lines += recorded.records(found, recorded.Chosen(), stats=stats)
        for line in lines:
            if not line.plain.isprintable():
                raise AssertionError(f"{line.plain!r} would steer a terminal")
        for trace in found.ranks.values():
            for number in range(len(trace.records)):
                for read in (trace.tensor, trace.sketch, trace.stats):
                    with suppress(TraceError):
                        read(number)


def trace_index(content: bytes) -> None:
    """The index of a recording."""
    _with_file(INDEX, content)


def trace_line(content: bytes) -> None:
    """One line of an index, between right ones."""
    lines = (recording() / INDEX).read_bytes().splitlines(keepends=True)
    trace_index(b"".join([*lines[:3], content + b"\n", *lines[3:]]))


def trace_data(content: bytes) -> None:
    """The data of a recording, whose index is right."""
    _with_file(DATA, content)


def _with_file(name: str, content: bytes) -> None:
    path = recording() / name
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        _read_recording(recording())
    finally:
        path.write_bytes(before)


def _read_checkpoint(folder: Path) -> None:
    with suppress(CheckpointError):
        read_extra(folder)
    with suppress(CheckpointError):
        export(folder, _folder() / "out.safetensors")


def checkpoint_index(content: bytes) -> None:
    """The index of a checkpoint."""
    path = checkpoint() / "index.json"
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        _read_checkpoint(checkpoint())
    finally:
        path.write_bytes(before)


def weights(content: bytes) -> None:
    """A safetensors file of whole weights, as `Training.load_path` takes it."""
    path = _folder() / "weights.safetensors"
    path.write_bytes(content)
    model = nn.Linear(3, 2)
    with suppress(CheckpointError):
        load_weights(path, model, list(held_parameters(model)))


def _exported() -> bytes:
    export(checkpoint(), _folder() / "weights.safetensors")
    return (_folder() / "weights.safetensors").read_bytes()


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]]]] = {
    "trace_index": (trace_index, lambda: [(recording() / INDEX).read_bytes()]),
    "trace_line": (trace_line, lambda: (recording() / INDEX).read_bytes().splitlines()),
    # Its header is mostly room that is kept free.
    "trace_data": (trace_data, lambda: [(recording() / DATA).read_bytes()]),
    "checkpoint_index": (checkpoint_index, lambda: [(checkpoint() / "index.json").read_bytes()]),
    "weights": (weights, lambda: [_exported()]),
}
"""Name -> (what reads bytes, right bytes to begin with)."""
