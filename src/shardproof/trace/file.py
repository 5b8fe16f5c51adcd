"""A rank's records in one safetensors file: the tensors, and the records as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from shardproof.parallel.piece import Piece
from shardproof.trace.record import Record


def save(path: Path, entries: Iterable[tuple[Record, Tensor | None]]) -> None:
    """Write records and their tensors, on whatever device those are, to `path`."""
    tensors: dict[str, Tensor] = {}
    records = []
    for number, (record, tensor) in enumerate(entries):
        records.append(_as_plain(record))
        if tensor is not None:
            tensors[str(number)] = tensor.cpu().contiguous()
    save_file(tensors, path, metadata={"records": json.dumps(records, separators=(",", ":"))})


class TraceFile:
    """What one rank showed. Tensors are read from the file one by one, when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = safe_open(path, "pt")
        metadata: dict[str, str] = self._file.metadata()  # type: ignore[no-untyped-call]
        self.records = tuple(_from_plain(plain) for plain in json.loads(metadata["records"]))

    def tensor(self, number: int) -> Tensor:
        """The tensor of record `number`."""
        tensor: Tensor = self._file.get_tensor(str(number))  # type: ignore[no-untyped-call]
        return tensor

    @cached_property
    def by_key(self) -> dict[tuple[int, str, str, str], list[int]]:
        """Key -> numbers of its records, in the order in which they were made; those that are `unknown` left out."""
        found: dict[tuple[int, str, str, str], list[int]] = {}
        for number, record in enumerate(self.records):
            if record.unknown:
                continue
            found.setdefault(record.key, []).append(number)
        return found


def _as_plain(record: Record) -> dict[str, object]:
    plain = asdict(record)
    return {key: value for key, value in plain.items() if value != _DEFAULTS.get(key, _NONE)}


def _from_plain(plain: dict[str, Any]) -> Record:
    piece = plain.pop("piece", None)
    if isinstance(piece, dict):
        piece = Piece(**{key: _tuples(value) for key, value in piece.items()})
    return Record(**plain, piece=piece)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


_NONE = object()
_DEFAULTS: dict[str, object] = {
    "part": "",
    "call": 0,
    "piece": None,
    "missing": False,
    "unknown": False,
    "draws": 0,
    "weight": 1.0,
}
"""Fields that are left out of the file where they say nothing."""
