"""A rank's records in one safetensors file: the tensors, and the records as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from shardproof.trace.plain import as_plain, from_plain
from shardproof.trace.record import Record
from shardproof.trace.trace import numbers_by_key


def save(path: Path, entries: Iterable[tuple[Record, Tensor | None]]) -> None:
    """Write records and their tensors, on whatever device those are, to `path`."""
    tensors: dict[str, Tensor] = {}
    records = []
    for number, (record, tensor) in enumerate(entries):
        records.append(as_plain(record))
        if tensor is not None:
            tensors[str(number)] = tensor.cpu().contiguous()
    save_file(tensors, path, metadata={"records": json.dumps(records, separators=(",", ":"))})


class TraceFile:
    """What one rank showed. Tensors are read from the file one by one, when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = safe_open(path, "pt")
        metadata: dict[str, str] = self._file.metadata()  # type: ignore[no-untyped-call]
        self.records = tuple(from_plain(plain) for plain in json.loads(metadata["records"]))

    def tensor(self, number: int) -> Tensor:
        """The tensor of record `number`."""
        tensor: Tensor = self._file.get_tensor(str(number))  # type: ignore[no-untyped-call]
        return tensor

    @cached_property
    def by_key(self) -> dict[tuple[int, str, str, str], list[int]]:
        """Key -> numbers of its records, in the order in which they were made; those that are `unknown` left out."""
        return numbers_by_key(self.records)
