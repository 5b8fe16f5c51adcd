"""One of the two recorded runs, understood: its ranks in mesh order, its parts of each batch, under common names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shardproof.align.samples import Reads
from shardproof.align.traces import Aligned, Key
from shardproof.align.understood import Layout
from shardproof.trace.trace import Trace

NAMED = 4
"""Ranks that are listed."""


@dataclass(kw_only=True)
class Side:
    """A recorded run as it is compared."""

    label: str
    """As the reader knows it: the path that was given."""

    traces: Sequence[Trace]
    """By place on the mesh; a rank that is missing shows nothing."""

    layout: Layout
    reads: Reads

    samples: Mapping[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """Step -> [data rank][micro-batch] -> samples; empty where nothing was read that could be counted."""

    _microbatches: dict[int, int] = field(default_factory=dict)

    def rank(self, place: int) -> int:
        """The rank of the recording that stands at a place of the mesh."""
        return self.layout.order[place]

    def named(self, places: Sequence[int]) -> str:
        """The ranks that stand at some places, in words: `ranks 1, 3 of tp2`."""
        ranks = sorted(map(self.rank, places))
        listed = ", ".join(map(str, ranks[:NAMED])) + (", ..." if len(ranks) > NAMED else "")
        return f"rank{'s' if len(ranks) > 1 else ''} {listed} of {self.label}"

    def microbatches(self, step: int) -> int:
        """Micro-batches of one rank in a step; 1 where nobody counted."""
        if step not in self._microbatches:
            self._microbatches[step] = max((len(parts) for parts in self.reads.get(step, ())), default=1) or 1
        return self._microbatches[step]

    def parts(self, step: int) -> list[tuple[int, int, int]]:
        """(data rank, micro-batch, samples) of each part of a step, in order; one sample each if not counted."""
        rows = self.samples.get(step)
        if not rows:
            many = self.microbatches(step)
            return [(rank, m, 1) for rank in range(self.layout.parallelism.dp) for m in range(many)]
        return [(rank, m, count) for rank, row in enumerate(rows) for m, count in enumerate(row)]

    def silent(self, step: int) -> tuple[int, ...]:
        """Places of which it is not known, or not all, what they read in a step: they are missing, or were cut off."""
        reads = self.reads.get(step, [])
        most = max(map(len, reads), default=0)
        return tuple(
            place
            for place, trace in enumerate(self.traces)
            if (place < len(reads) and len(reads[place]) < most)
            or (isinstance(trace, Aligned) and trace.unfinished(step))
        )

    def without(self, key: Key) -> tuple[int, ...]:
        """Places that may have held a part of what others show by hand, and of which that cannot be read."""
        pieces = [trace.records[number].piece for trace in self.traces for number in trace.by_key.get(key, ())]
        if all(piece is None or piece.declared or piece.local_shape == piece.whole for piece in pieces):
            return ()
        return tuple(
            place
            for place, trace in enumerate(self.traces)
            if key not in trace.by_key and not (isinstance(trace, Aligned) and trace.trace.complete)
        )

    def order(self, step: int) -> list[str]:
        """Digests of a step's samples, part by part; TP peers read the same, so that one speaks for all."""
        reads = self.reads.get(step, [])
        return [
            sample
            for place in range(0, len(reads), self.layout.parallelism.tp)
            for part in reads[place]
            for sample in part
        ]
