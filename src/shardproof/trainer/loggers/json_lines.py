"""Values as lines of JSON in a file."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from shardproof.errors import UsageError
from shardproof.trainer.logger import Logger


class JSONLinesLogger(Logger):
    """Appends one JSON object a line to a file: `{"step": 40, "time": 1753.25, "values": {"train/loss": 0.5}}`.

    `time` is in seconds since 1970. A run starts with a line `{"run": {...}, "time": ...}` that says what it is; a run
    that is gone on with adds another one, so where a step stands twice, the later line counts.

    JSON has no NaN and no infinity: they are written as the texts "NaN", "Infinity" and "-Infinity", which tell an
    overflow from a 0/0, and which `float()` reads back.

    Every line is in the file when `log` returns.
    """

    def __init__(self, path: str | Path) -> None:
        """Raise `UsageError` where `path` is a folder. The file and its folders are made when the run starts."""
        self.path = Path(path)
        if self.path.is_dir():
            raise UsageError(f"JSONLinesLogger: {self.path} is a folder; give a file in it, as {self.path}/run.jsonl")
        self._file: BinaryIO | None = None

    def open(self, about: Mapping[str, Any]) -> None:
        """Open the file at its end, and write what the run is."""
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        if not self._ends_with_a_line():
            # A run that was killed while it wrote: its half line must not spoil our first one.
            self._file.write(b"\n")
        self._write({"run": dict(about), "time": time.time()})

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write one line."""
        self._write({"step": step, "time": time.time(), "values": dict(values)})

    def close(self, *, failed: bool = False) -> None:
        """Close the file."""
        del failed
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            raise UsageError(f"JSONLinesLogger: {self.path} is not open; call open() before log()")
        self._file.write(json.dumps(_plain(line), allow_nan=False).encode() + b"\n")
        self._file.flush()

    def _ends_with_a_line(self) -> bool:
        if self._file is None or self._file.seek(0, os.SEEK_END) == 0:
            return True
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) == b"\n"


def _plain(value: Any) -> Any:
    """What JSON can hold: texts for numbers that are not finite, and for whatever else it does not know."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, str | int | float) else str(value)
