"""Steps out of the user's own `Experiment.batches`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import count, islice
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map_only

from shardproof.errors import ExperimentError, UsageError
from shardproof.parallel.data import Microbatch, dataset_of, is_stream, refuse_loader, resolved
from shardproof.parallel.seeding import seed_sample
from shardproof.parallel.source import Planned, Snapshots, Source, tell_epoch
from shardproof.spec.experiment import Batch, Experiment
from shardproof.spec.parallelism import Parallelism


class OwnBatches(Source):
    """`Experiment.batches` is called once per epoch, and what it yields ends the epoch, if it ends.

    Every micro-batch is read under (seed, epoch, its number), the same on all ranks. A `set_epoch` of what it returns,
    or of its `sampler`, is told the epoch.
    """

    # Whoever writes a loader decides on its worker processes as well.
    reads_ahead = False

    def __init__(
        self, experiment: Experiment, mesh: DeviceMesh | None, parallelism: Parallelism | None, data_rank: int
    ) -> None:
        if mesh is None or parallelism is None:
            raise UsageError("Experiment.batches is called with the mesh and the parallelism; give both to the loader")
        self.experiment, self.mesh, self.parallelism = experiment, mesh, parallelism
        self.microbatches, self.size = experiment.microbatches, experiment.batch_size
        self.rank = str(data_rank)
        self.layout = [parallelism.dp, self.microbatches]
        data = resolved(experiment.data)
        refuse_loader(data)
        self.data = data if is_stream(data) else dataset_of(experiment)
        self.about = {"data": "Experiment.batches", "seed": experiment.seed}

    def epoch(self, epoch: int, done: int, snapshot: Mapping[str, Any] | None) -> Iterator[Planned]:
        """Raises `ExperimentError` where the batches end inside a step, or before step `done`."""
        given = self._called(epoch)
        own = None
        # The state of another rank's loader, or under another layout, tells nothing about this one.
        if snapshot is not None and snapshot["layout"] == self.layout:
            own = snapshot["by_rank"].get(self.rank)
        snapshots = Snapshots(given, f"what Experiment.batches returned ({type(given).__name__})", own)
        step = snapshots.restore()
        batches = self._batches(given, epoch, step * self.microbatches)
        skipped = sum(1 for _ in islice(batches, (done - step) * self.microbatches))
        ahead = list(islice(batches, 1))
        if not ahead:
            self._refuse_end(epoch, step * self.microbatches + skipped, done)
        for step in count(done + 1):
            taken = ahead + list(islice(batches, self.microbatches - 1))
            if len(taken) < self.microbatches:
                self._refuse_end(epoch, (step - 1) * self.microbatches + len(taken), done)
            own = snapshots.after(step)
            newest = None if own is None else {"layout": self.layout, "by_rank": {self.rank: own}}
            ahead = list(islice(batches, 1))
            parts = [Microbatch(batch, 1 / self.microbatches) for batch in taken]
            yield Planned(self.size, not ahead, lambda parts=parts: parts, newest)  # type: ignore[misc]
            if not ahead:
                return

    def _called(self, epoch: int) -> Any:
        seed_sample(self.experiment.seed, epoch, 0)
        if self.experiment.batches is None:
            raise UsageError("the experiment has no batches of its own")
        given = self.experiment.batches(self.data, self.mesh, self.parallelism)
        if not isinstance(given, Iterable):
            raise ExperimentError(
                f"Experiment.batches returned {type(given).__name__}; "
                "it must return an iterable of this rank's batches, or yield them"
            )
        for target in (given, getattr(given, "sampler", None)):
            tell_epoch(target, epoch)
        return given

    def _batches(self, given: Iterable[Batch], epoch: int, number: int) -> Iterator[Batch]:
        seed_sample(self.experiment.seed, epoch, number)
        left = iter(given)
        for at in count(number):
            seed_sample(self.experiment.seed, epoch, at)
            try:
                batch = next(left)
            except StopIteration:
                return
            # Copied: a loader may fill the same buffer again, and it is read one batch ahead.
            yield tree_map_only(Tensor, Tensor.clone, batch)

    def _refuse_end(self, epoch: int, read: int, done: int) -> None:
        if done and read <= done * self.microbatches:
            raise ExperimentError(
                f"Experiment.batches ended after {read} micro-batches of epoch {epoch}; the run that is resumed had "
                f"read {done * self.microbatches} and went on: give the same data, or resume from the end of "
                "an epoch"
            )
        if read == 0:
            raise ExperimentError(
                f"Experiment.batches yielded nothing in epoch {epoch}; it is called once per epoch, and must return "
                "an iterable that starts anew"
            )
        raise ExperimentError(
            f"Experiment.batches ended after {read} micro-batches of epoch {epoch}, inside a step: a step takes "
            f"{self.microbatches}; let it yield a multiple of that, or go on without end"
        )
