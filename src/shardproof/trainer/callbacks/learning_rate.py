"""Log the learning rates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardproof.trainer.callback import Callback

if TYPE_CHECKING:
    from shardproof.trainer.loop import Loop


class LearningRateMonitor(Callback):
    """Logs `lr/group0`, `lr/group1` ... whenever losses are: the rate that the last step was taken with."""

    def __init__(self) -> None:
        self._used: list[Any] = []

    def step_start(self, loop: Loop) -> None:
        """Keep the rates of this step: once it is over, the scheduler has set those of the next."""
        rates = [group["lr"] for group in loop.optimizer.param_groups]
        # A tensor is changed in place by the scheduler, and turning it into a number here would wait for the device.
        self._used = [rate.clone() if hasattr(rate, "clone") else rate for rate in rates]

    def losses(self, loop: Loop, first_step: int, losses: list[float]) -> None:
        """Log them."""
        del first_step, losses
        loop.log({f"lr/group{index}": float(rate) for index, rate in enumerate(self._used)})
