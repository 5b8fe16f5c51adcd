"""Values for Weights & Biases."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from shardproof.errors import UsageError
from shardproof.trainer.logger import Logger
from shardproof.trainer.optional import require

STEP = "step"
"""The axis that values are drawn over."""


class WandbLogger(Logger):
    """Logs to a run of Weights & Biases."""

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        *,
        id: str | None = None,
        folder: str | Path | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
    ) -> None:
        """Raise `UsageError` where wandb is not installed.

        Args:
            project: where the run is filed.
            name: what it is called.
            id: its name for the machine, unique in the project. A run with this id is gone on with where there is one.
            folder: where wandb keeps its files; None for the working directory.
            mode: `offline` writes files alone, for `wandb sync`; None for wandb's own setting.
        """
        require("wandb", extra="wandb", by="WandbLogger")
        self.project, self.name, self.id, self.folder, self.mode = project, name, id, folder, mode
        self._run: Any = None

    def open(self, about: Mapping[str, Any]) -> None:
        """Start the run, or go on with it; `about` becomes its config."""
        self._run = importlib.import_module("wandb").init(
            project=self.project,
            name=self.name,
            id=self.id,
            resume=None if self.id is None else "allow",
            dir=None if self.folder is None else str(self.folder),
            mode=self.mode,
            config=dict(about),
            allow_val_change=True,
        )
        # wandb's own step never goes back, not even where a run is gone on with from an earlier checkpoint: it would
        # drop the values. An axis of our own may.
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log them over `step`."""
        if self._run is None:
            raise UsageError("WandbLogger is not open; call open() before log()")
        self._run.log({**values, STEP: step})

    def close(self, *, failed: bool = False) -> None:
        """Finish the run, which sends what is held back."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))
            self._run = None
