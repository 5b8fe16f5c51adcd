"""Stop when evaluations no longer get better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from shardproof.errors import UsageError
from shardproof.spec.strategies import suggest
from shardproof.trainer.callback import Callback

if TYPE_CHECKING:
    from shardproof.trainer.loop import Loop


class EarlyStopping(Callback):
    """Ends training after `patience` evaluations in a row that were no better than the best one.

    A value that is NaN or infinite is never better. What was seen so far goes into checkpoints, so that a resumed run
    stops where an uninterrupted one would have.
    """

    def __init__(
        self,
        monitor: str = "loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
    ) -> None:
        """Raise `UsageError` for values that no run could use.

        Args:
            monitor: `loss`, or the name of a metric.
            mode: whether less of it is better, or more.
            patience: evaluations in a row without improvement that end training.
            min_delta: by how much a value must be better than the best one, at the least, to count as better.
        """
        if mode not in ("min", "max"):
            raise UsageError(f"EarlyStopping: mode={mode!r}; {suggest(str(mode), ('min', 'max'))}")
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise UsageError(f"EarlyStopping: patience={patience!r}; it must be a whole number of at least 1")
        if not (min_delta >= 0 and math.isfinite(min_delta)):
            raise UsageError(f"EarlyStopping: min_delta={min_delta!r}; it must be a number of at least 0")
        # Loggers show `eval/loss`, so people will write that.
        self.monitor = monitor.removeprefix("eval/")
        self.mode, self.patience, self.min_delta = mode, patience, min_delta
        self.best: float | None = None
        """The best finite value so far."""
        self.waited = 0
        """Evaluations since then."""

    def fit_start(self, loop: Loop) -> None:
        """Refuse a run that evaluates nothing, and end one that has been stopped before."""
        if loop.training.eval_data is None:
            raise UsageError(f"EarlyStopping watches the evaluation's {self.monitor!r}; give the trainer eval_data")
        if self.waited >= self.patience:
            # A run that was stopped and is resumed, as by a batch system that knows no better, has ended already.
            loop.stop(f"{self.monitor} was no better in {self.waited} evaluations already")

    def eval_end(self, loop: Loop, results: Mapping[str, float]) -> None:
        """Compare with the best so far. Every rank has the same results, so every rank stops."""
        if self.monitor not in results:
            raise UsageError(
                f"EarlyStopping: the evaluation gave no {self.monitor!r}; {suggest(self.monitor, list(results))}"
            )
        value = results[self.monitor]
        if self._better(value):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            best = "no finite value so far" if self.best is None else f"best {self.best:.6g}"
            loop.stop(f"{self.monitor} was no better in {self.waited} evaluations (last {value:.6g}, {best})")

    def _better(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        gain = self.best - value if self.mode == "min" else value - self.best
        return gain > self.min_delta

    def state_dict(self) -> dict[str, Any]:
        """The best value and how long ago it was."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self.best, self.waited = state["best"], state["waited"]
