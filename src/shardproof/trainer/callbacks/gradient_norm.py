"""Log the norm of the gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardproof.errors import UsageError
from shardproof.trainer.callback import Callback, global_norm

if TYPE_CHECKING:
    from torch import Tensor

    from shardproof.trainer.loop import Loop


class GradientNorm(Callback):
    """Logs `gradient/norm`, the global 2-norm before clipping, as one device would compute it, every n-th step."""

    watches_gradients = True

    def __init__(self, every: int = 10) -> None:
        """Raise `UsageError` for an `every` below 1, in optimizer steps. Each report waits for the device."""
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UsageError(f"GradientNorm: every={every!r}; it must be a whole number of at least 1")
        self.every = every
        self._norm: Tensor | None = None

    def gradients(self, loop: Loop) -> None:
        """Compute it, on all ranks."""
        # The step that these gradients belong to is not counted yet.
        if (loop.progress.step + 1) % self.every == 0:
            self._norm = global_norm(loop)

    def step_end(self, loop: Loop) -> None:
        """Log it, now that the step is counted."""
        if self._norm is not None:
            loop.log({"gradient/norm": float(self._norm)})
            self._norm = None
