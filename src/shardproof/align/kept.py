"""What a side kept of a tensor where it did not keep all values: sketches and statistics, for `compare.sketched`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from shardproof.align.side import Side
from shardproof.align.traces import Aligned, Key
from shardproof.compare import sketched
from shardproof.compare.wholes import Shown, read
from shardproof.trace.record import Record
from shardproof.trace.sketch import norm, sketch
from shardproof.trace.stats import stats_of

BY_SAMPLE = frozenset({"forward", "backward"})
"""Stages whose sketches may draw their signs from the samples of the batch."""


def sketched_keys(sides: Sequence[Side]) -> set[Key]:
    """Keys of which some record of either side has no values: a verdict on them rests on sketches or statistics."""
    return {
        record.key
        for side in sides
        for trace in side.traces
        if isinstance(trace, Aligned)
        for number, record in enumerate(trace.records)
        if not record.missing and trace.trace.depth(number) != "full"
    }


def kept(side: Side, key: Key) -> sketched.Side:
    """What all ranks of a side kept of a key; of values a sketch is made, as the other side has one."""
    shown = [one for place, trace in enumerate(side.traces) for one in _of_rank(side, place, trace, key)]
    return sketched.Side(shown=shown, parallelism=side.layout.parallelism, microbatches=side.microbatches(key[0]))


def _of_rank(side: Side, place: int, trace: object, key: Key) -> Iterator[Shown]:
    if not isinstance(trace, Aligned):
        return
    numbers = trace.by_key.get(key, ())
    calls = max(len(numbers) // side.microbatches(key[0]), 1)
    for turn, number in enumerate(sorted(numbers, key=lambda n: trace.records[n].call)):
        record, held = trace.records[number], trace.trace
        shape, dtype = held.shape(number), held.dtype(number)
        depth = None if record.missing else held.depth(number)
        if depth is None or dtype is None:
            yield Shown(rank=place, record=record, shape=shape, dtype=dtype or torch.float32)
            continue
        if depth == "full":
            tensor, samples = held.tensor(number), _samples(side, place, record, turn // calls, shape)
            yield Shown(
                rank=place,
                record=record,
                shape=shape,
                dtype=dtype,
                sketch=sketch(tensor, record.piece, samples),
                stats=stats_of(tensor),
                by_sample=samples is not None,
            )
            continue
        yield Shown(
            rank=place,
            record=record,
            shape=shape,
            dtype=dtype,
            sketch=held.sketch(number) if depth == "sketch" else None,
            stats=held.stats(number),
            by_sample=depth == "sketch" and held.keyed(number) == "samples",
        )


def _samples(side: Side, place: int, record: Record, microbatch: int, shape: tuple[int, ...]) -> tuple[str, ...] | None:
    """The samples of an output whose first dim is the batch, by the rule of who records; None where there are none."""
    parts = side.reads.get(record.step, ())
    if record.stage not in BY_SAMPLE or place >= len(parts) or microbatch >= len(parts[place]):
        return None
    samples = parts[place][microbatch]
    return samples if samples and shape and shape[0] == len(samples) else None


def norm_of(side: sketched.Side) -> float:
    """The 2-norm of a side's tensor as a whole; 0 where it cannot be told."""
    present = [one for one in side.shown if not one.record.missing]
    if not present:
        return 0.0
    first = next(iter(read(side).wholes), None)
    if first is None:
        return 0.0
    if first.sketch is not None:
        return norm(first.sketch)
    return first.stats.norm if first.stats is not None else 0.0
