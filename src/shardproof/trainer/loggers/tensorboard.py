"""Values for TensorBoard."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardproof.errors import UsageError
from shardproof.trainer.logger import Logger
from shardproof.trainer.optional import require


class TensorBoardLogger(Logger):
    """Writes event files into `folder`; look at them with `tensorboard --logdir FOLDER`.

    A run that is gone on with writes into the same folder: TensorBoard drops what was logged there at later steps than
    the first new one, so that its curves do not run back.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raise `UsageError` where tensorboard is not installed."""
        require("tensorboard", extra="tensorboard", by="TensorBoardLogger")
        self.folder = Path(folder)
        self._about: dict[str, Any] = {}
        self._make: Any = None
        self._writer: Any = None

    def open(self, about: Mapping[str, Any]) -> None:
        """Load TensorBoard's writer, so that a broken installation is seen before the first step."""
        self._make = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._about = dict(about)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write the values as scalars."""
        if self._writer is None:
            if self._make is None:
                raise UsageError(f"TensorBoardLogger: {self.folder} is not open; call open() before log()")
            # Only now, as the writer wants to know the first step.
            self._writer = self._make(str(self.folder), purge_step=step)
            self._writer.add_text("run", f"```json\n{json.dumps(self._about, indent=2, default=str)}\n```", step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool = False) -> None:
        """Write what is held back."""
        del failed
        if self._writer is not None:
            self._writer.close()
            self._writer = None
