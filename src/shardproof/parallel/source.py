"""Where the steps of a run come from: the same few words for data sets, streams and a user's own loader."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardproof.parallel.data import GlobalBatches, Microbatch
from shardproof.parallel.portable import NotPortable, packed, unpacked

SNAPSHOT_STEPS = 16
"""Steps between two states of a stream or of a user's loader. A state may be large (a shuffle buffer), and to read
again the few steps since the newest one is cheap."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A step whose place in the epoch is known, and whose batches are read where they are asked for."""

    samples: int
    """Of the global batch."""

    last: bool
    """Whether the epoch ends with it."""

    read: Callable[[], list[Microbatch]]
    """This rank's micro-batches; to be called before the next step is asked for, or not at all."""

    snapshot: Mapping[str, Any] | None = None
    """What helps to go on right after this step: plain data for `Source.epoch`, or None."""


class Source(ABC):
    """Steps, epoch after epoch."""

    steps_per_epoch: int | None = None
    """None where nobody knows before the end."""

    about: Mapping[str, Any]
    """What must not change for a run to go on inside an epoch: plain data, {name: value}."""

    reads_ahead: bool = True
    """Whether worker processes may read it: each of them then goes through all steps, and reads its own."""

    @abstractmethod
    def epoch(self, epoch: int, done: int, snapshot: Mapping[str, Any] | None) -> Iterator[Planned]:
        """The steps of an epoch from its step `done` on; `snapshot` is that of the step before, where there is one.

        There is always at least one step.
        """


class Numbered(Source):
    """A map-style data set."""

    def __init__(self, batches: GlobalBatches, data_rank: int) -> None:
        self.batches, self.data_rank = batches, data_rank
        self.steps_per_epoch: int = batches.steps_per_epoch
        self.about = {
            "data": "a data set",
            "seed": batches.seed,
            "shuffle": batches.shuffle,
            "len(data)": len(batches.data),
        }

    def epoch(self, epoch: int, done: int, snapshot: Mapping[str, Any] | None) -> Iterator[Planned]:
        """The same steps for every layout."""
        del snapshot
        batches, steps = self.batches, self.steps_per_epoch
        for at in range(done, steps):
            last = at + 1 == steps
            samples = min(batches.size, len(batches.data) - at * batches.size)
            step = epoch * steps + at
            yield Planned(samples, last, lambda step=step: batches.read(step, self.data_rank))  # type: ignore[misc]


class Snapshots:
    """The newest state of a stream or loader that has `state_dict` and `load_state_dict`; nothing for any other."""

    def __init__(self, target: Any, name: str, newest: Mapping[str, Any] | None = None) -> None:
        stateful = all(callable(getattr(target, method, None)) for method in ("state_dict", "load_state_dict"))
        self.target = target if stateful else None
        self.name = name
        self.newest = newest if stateful else None

    def restore(self) -> int:
        """Puts the target where the newest state was taken, and returns that step of the epoch; 0 without a state."""
        if self.newest is None or self.target is None:
            return 0
        self.target.load_state_dict(unpacked(self.newest["state"]))
        return int(self.newest["step"])

    def after(self, step: int) -> Mapping[str, Any] | None:
        """The newest state, which is taken now where it is time to, with `step` steps of the epoch read."""
        if self.target is not None and step % SNAPSHOT_STEPS == 0:
            try:
                # A copy: the target goes on before anybody writes it down.
                self.newest = {"step": step, "state": packed(self.target.state_dict())}
            except NotPortable as error:
                self.target = self.newest = None
                warnings.warn(
                    f"the state of {self.name} cannot be saved, because {error}, which is no plain data: a run that "
                    "is resumed reads it again from the start of the epoch",
                    stacklevel=2,
                )
        return self.newest


def tell_epoch(target: Any, epoch: int) -> None:
    """Calls `set_epoch` where there is one, as torch's DistributedSampler and streams that shuffle have."""
    if callable(getattr(target, "set_epoch", None)):
        target.set_epoch(epoch)
