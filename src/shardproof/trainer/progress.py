"""How far a run has come, and what is due on the way."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from shardproof.spec.duration import Duration


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run has done since its very first step, whether or not it was resumed in between."""

    step: int = 0
    """Optimizer steps."""

    epoch: int = 0
    """Whole passes over the data; so also the number, from 0, of the one that is going on."""

    samples: int = 0
    """Over all ranks."""

    elapsed_s: float = 0.0
    """Seconds of training by rank 0's clock, as ranks last exchanged them."""

    def after(self, samples: int, *, epoch_ended: bool) -> Progress:
        """One optimizer step later."""
        return replace(
            self, step=self.step + 1, samples=self.samples + samples, epoch=self.epoch + (1 if epoch_ended else 0)
        )

    def reached(self, duration: Duration) -> bool:
        """Whether the run has come that far."""
        return self._of(duration) >= duration.count

    def share(self, duration: Duration, samples_per_epoch: int | None) -> float:
        """How much of `duration` is done, from 0 to 1."""
        done = self._of(duration)
        if duration.unit == "ep" and samples_per_epoch:
            done = self.samples / samples_per_epoch
        return min(1.0, done / duration.count)

    def _of(self, duration: Duration) -> float:
        return {"ba": self.step, "ep": self.epoch, "sp": self.samples, "s": self.elapsed_s}[duration.unit]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)


class Interval:
    """Something that is due every so often."""

    def __init__(self, every: Duration, start: Progress) -> None:
        self._every = every
        self._last = start

    def due(self, now: Progress) -> bool:
        """Whether it is due; it then counts as done.

        Counted from the start of the run, so that a resumed run does things at the same steps. Time is counted from
        the last time, as ranks agree on it only now and then.
        """
        every, last = self._every, self._last
        before, after = last._of(every), now._of(every)
        found = after - before >= every.count if every.unit == "s" else after // every.count > before // every.count
        if found or every.unit != "s":
            self._last = now
        return found
