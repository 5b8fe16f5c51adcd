"""The names of a recording's files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_INDEX = re.compile(r"rank-(\d{5,7})\.jsonl", re.ASCII)
_DATA = re.compile(r"rank-(\d{5,7})(?:-[1-9]\d{0,5})?\.safetensors", re.ASCII)

LAST_FILE = 999_999
"""Largest number of a data file."""


def index_name(rank: int) -> str:
    """`rank-00003.jsonl`."""
    return f"rank-{rank:05d}.jsonl"


def data_name(rank: int, file: int) -> str:
    """`rank-00003.safetensors`, then `rank-00003-1.safetensors` and so on."""
    return f"rank-{rank:05d}{f'-{file}' if file else ''}.safetensors"


def index_files(folder: Path) -> Iterator[tuple[int, Path]]:
    """(rank, path) of every index in `folder`, by rank. Names that a writer would not give are not looked at."""
    found = ((_rank(_INDEX, path), path) for path in folder.iterdir())
    yield from sorted((rank, path) for rank, path in found if rank is not None and path.name == index_name(rank))


def files_of_ranks(folder: Path) -> Iterator[tuple[int, Path]]:
    """(rank, path) of every index and data file in `folder`, in any order."""
    for path in folder.iterdir():
        for kind in (_INDEX, _DATA):
            rank = _rank(kind, path)
            if rank is not None:
                yield rank, path


def _rank(kind: re.Pattern[str], path: Path) -> int | None:
    found = kind.fullmatch(path.name)
    return int(found[1]) if found else None
