"""Data that can only be read one sample after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count, islice
from typing import Any

from torch.utils.data import get_worker_info

from shardproof.errors import ExperimentError
from shardproof.parallel.data import Cut, Microbatch
from shardproof.parallel.samples import collated
from shardproof.parallel.seeding import seed_sample
from shardproof.parallel.source import Planned, Snapshots, Source, tell_epoch


class Stream(Source):
    """Sample i of the stream belongs to global batch i // size. The end of the stream ends the epoch.

    Every rank, and every worker of a rank, goes through the whole stream and keeps its own part, so that all layouts
    see the same data. What a stream draws when it is asked for a sample, it draws under (seed, epoch, step), whoever
    asks. One that draws from a generator of its own must seed it by itself, the same everywhere.
    """

    def __init__(
        self, stream: Any, data: Any, *, size: int, cut: Cut, data_rank: int, seed: int, drop_last: bool = False
    ) -> None:
        """`stream` is what `data` is, or what it returned where it is a function, which may then be called again.

        A one-time iterator without a function that makes it lasts for one epoch only.
        """
        self.size, self.cut, self.data_rank, self.seed = size, cut, data_rank, seed
        self._least = size if drop_last else 1
        """Samples that make a step."""
        self._stream = stream
        self._make = None if stream is data else data
        self._opened = False
        length = _length(self._stream)
        if length is not None:
            self.steps_per_epoch = length // size if drop_last else -(-length // size)
        self.about = {"data": "a stream", "seed": seed}

    def epoch(self, epoch: int, done: int, snapshot: Mapping[str, Any] | None) -> Iterator[Planned]:
        """Raises `ExperimentError` where the stream ends before the first step, or before step `done`."""
        stream = self._open()
        tell_epoch(stream, epoch)
        snapshots = Snapshots(stream, f"the stream ({type(stream).__name__})", snapshot)
        step = snapshots.restore()
        samples = self._samples(stream, epoch, step * self.size)
        skipped = sum(1 for _ in islice(samples, (done - step) * self.size))
        taken = list(islice(samples, self.size))
        if len(taken) < self._least:
            self._refuse_end(epoch, step * self.size + skipped + len(taken), done)
        for step in count(done + 1):
            # Before the look ahead, so that who goes on from here reads those samples again.
            newest = snapshots.after(step)
            ahead = list(islice(samples, self._least if len(taken) == self.size else 0))
            last = len(ahead) < self._least
            yield Planned(len(taken), last, lambda batch=taken: self._parts(batch), newest)  # type: ignore[misc]
            if last:
                return
            taken = ahead + list(islice(samples, self.size - self._least))

    def _open(self) -> Any:
        """The stream, made anew where it was used up, or where it was made in another process: files that are open in
        two processes share their position."""
        used_up = self._opened and isinstance(self._stream, Iterator)
        elsewhere = not self._opened and get_worker_info() is not None
        if self._make is not None and (used_up or elsewhere):
            self._stream = self._make()
        self._opened = True
        return self._stream

    def _samples(self, stream: Any, epoch: int, index: int) -> Iterator[Any]:
        try:
            seed_sample(self.seed, epoch, index)
            left = iter(stream)
            while True:
                # At every place where a training step may have drawn since the sample before: between batches, and
                # between the look ahead, which is one sample or a whole batch, and the rest of that batch.
                if index % self.size < 2:
                    seed_sample(self.seed, epoch, index)
                try:
                    sample = next(left)
                except StopIteration:
                    return
                yield sample
                index += 1
        except Exception as error:
            error.add_note(f"while sample {index} of the stream ({type(stream).__name__}) was read, in epoch {epoch}")
            raise

    def _parts(self, batch: list[Any]) -> list[Microbatch]:
        parts = self.cut.of_rank(batch, self.data_rank)
        return [Microbatch(collated(list(own), "samples of the stream"), weight) for own, weight in parts]

    def _refuse_end(self, epoch: int, read: int, done: int) -> None:
        kind = f"the stream ({type(self._stream).__name__})"
        if done:
            raise ExperimentError(
                f"{kind} ended after {read} samples of epoch {epoch}; the run that is resumed had read "
                f"{done * self.size} and went on: give the same data, or resume from the end of an epoch"
            )
        if read:
            raise ExperimentError(
                f"{kind} ended after {read} samples, less than one batch of {self.size}, and a train_step of your own "
                "gets whole batches only; lower batch_size or add data"
            )
        if self._make is None and isinstance(self._stream, Iterator):
            raise ExperimentError(
                f"{kind} yielded no sample in epoch {epoch}: an iterator can be read once only; "
                "give a function that returns it, or an object whose __iter__ starts anew"
            )
        raise ExperimentError(f"{kind} yielded no sample in epoch {epoch}; add data")


def _length(stream: Any) -> int | None:
    try:
        return len(stream)
    except (TypeError, NotImplementedError):
        return None
