"""Log how fast training goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shardproof.errors import UsageError
from shardproof.trainer.callback import Callback

if TYPE_CHECKING:
    from shardproof.trainer.loop import Loop


@dataclass(slots=True)
class _Window:
    """Where a stretch of steps began."""

    step: int
    samples: int
    time_s: float


class Throughput(Callback):
    """Logs `throughput/samples_per_s` and `throughput/steps_per_s` over windows of steps, of all ranks together.

    With `flops_per_sample` it also logs `throughput/tflops_per_rank`, and with `peak_flops` `throughput/mfu`, the model
    FLOPs utilisation of PaLM (arXiv:2204.02311, appendix B): what the model needs, over what the devices could do.

    Evaluating and saving do not count, nor do the first steps, which allocate, compile and fill caches.
    """

    def __init__(
        self,
        flops_per_sample: float | None = None,
        peak_flops: float | None = None,
        *,
        every: int = 10,
        skip: int = 3,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Raise `UsageError` for values that no run could use.

        Args:
            flops_per_sample: floating point operations of one sample, forward and backward; for a decoder about
                6 x parameters x tokens. Recomputed activations do not count.
            peak_flops: what one rank's device can do per second in the precision that is used.
            every: least number of steps of a window. It ends where losses are exchanged, when devices are heard of.
            skip: first steps of this process that are left out.
            clock: tells the time in seconds.
        """
        for name, value in (("flops_per_sample", flops_per_sample), ("peak_flops", peak_flops)):
            if value is not None and not value > 0:
                raise UsageError(f"Throughput: {name}={value!r}; it must be above 0, or None")
        if peak_flops is not None and flops_per_sample is None:
            raise UsageError("Throughput: peak_flops is of no use without flops_per_sample; give both")
        for name, number, least in (("every", every, 1), ("skip", skip, 0)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise UsageError(f"Throughput: {name}={number!r}; it must be a whole number of at least {least}")
        self.flops_per_sample, self.peak_flops = flops_per_sample, peak_flops
        self.every, self.skip = every, skip
        self._clock = clock
        self._taken = 0
        self._window: _Window | None = None
        self._last_s = 0.0

    def fit_start(self, loop: Loop) -> None:
        """Start afresh: the steps before a resumption were taken by another process."""
        del loop
        self._taken, self._window = 0, None

    def step_end(self, loop: Loop) -> None:
        """Count the step."""
        del loop
        self._taken += 1
        self._last_s = self._clock()

    def losses(self, loop: Loop, first_step: int, losses: list[float]) -> None:
        """End the window and log, where it is long enough."""
        del first_step, losses
        if self._taken < self.skip:
            return
        now = _Window(loop.progress.step, loop.progress.samples, self._clock())
        if self._window is None:
            self._window = now
            return
        steps, seconds = now.step - self._window.step, now.time_s - self._window.time_s
        if steps < self.every or not seconds > 0:
            return
        samples_per_s = (now.samples - self._window.samples) / seconds
        values = {"throughput/samples_per_s": samples_per_s, "throughput/steps_per_s": steps / seconds}
        if self.flops_per_sample is not None:
            per_rank = self.flops_per_sample * samples_per_s / loop.parallelism.world_size
            values["throughput/tflops_per_rank"] = per_rank / 1e12
            if self.peak_flops is not None:
                values["throughput/mfu"] = per_rank / self.peak_flops
        loop.log(values)
        self._window = now

    def eval_end(self, loop: Loop, results: Mapping[str, float]) -> None:
        """Leave the time of the evaluation out."""
        del loop, results
        self._leave_out()

    def saved(self, loop: Loop, path: Path) -> None:
        """Leave the time of saving out."""
        del loop, path
        self._leave_out()

    def _leave_out(self) -> None:
        """Move the start of the window by the time since the last step, or since the last thing that was left out."""
        now = self._clock()
        if self._window is not None:
            # A window that began after the last step has lost only what came after its own beginning.
            self._window.time_s += now - max(self._last_s, self._window.time_s)
        self._last_s = now
