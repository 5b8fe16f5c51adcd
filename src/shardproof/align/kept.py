"""What a side kept of a tensor where it did not keep all values: sketches and statistics, for `compare.sketched`."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial
from itertools import groupby

import torch

from shardproof.align.halves import in_halves
from shardproof.align.side import Side
from shardproof.align.traces import Aligned, Key
from shardproof.compare import sketched
from shardproof.compare.norms import Norms
from shardproof.compare.verdict import Comparison
from shardproof.compare.wholes import Shown, read
from shardproof.spec.stages import STAGES
from shardproof.trace.folder.sketches import read_sketches
from shardproof.trace.record import Record
from shardproof.trace.sketch import norm, sketch
from shardproof.trace.stats import stats_of

BY_SAMPLE = frozenset({"forward", "backward"})
"""Stages whose sketches may draw their signs from the samples of the batch."""

MANY = 100_000
"""Records of a step from which on a second process is worth its while: some seconds of work."""

BY_RELATIVES = frozenset({"gradient", "grad-norm"})
"""Stages in which the floor of a tensor rests on the norms of others, which are needed first."""


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


def kept(side: Side, key: Key, *, statistics: bool = True) -> sketched.Side:
    """What all ranks of a side kept of a key; of values a sketch is made, as the other side has one.

    `statistics`: those beside sound sketches as well, for a side that has nothing else.
    """
    found = [
        (place, trace, number, microbatch, trace.trace.kept(number))
        for place, trace in enumerate(side.traces)
        if isinstance(trace, Aligned)
        for number, microbatch in _numbers(side, trace, key)
    ]
    batches = read_sketches([(trace.trace, held) for _, trace, _, _, held in found if held.sketch_dtype is not None])
    others = [
        _without_sketch(side, place, trace, number, microbatch)
        for place, trace, number, microbatch, held in found
        if held.sketch_dtype is None
    ]
    # Beside a sketch statistics only say where NaN and infinities are; one sum tells whether there are any.
    made = [one.sketch for one in others if one.sketch is not None]
    statistics = statistics or not all(math.isfinite(float(some.sum())) for some in (*batches.values(), *made))
    rows = {dtype: iter(batch.unbind(0)) for dtype, batch in batches.items()}
    without = iter(others)
    shown = [
        Shown(
            rank=place,
            record=trace.records[number],
            shape=held.shape,
            dtype=held.dtype,  # type: ignore[arg-type]  # there was a tensor
            sketch=next(rows[held.sketch_dtype]),
            stats=trace.trace.stats(number) if statistics else None,
            by_sample=held.keyed == "samples",
        )
        if held.sketch_dtype is not None
        else next(without)
        for place, trace, number, _, held in found
    ]
    return sketched.Side(shown=shown, parallelism=side.layout.parallelism, microbatches=side.microbatches(key[0]))


def _numbers(side: Side, trace: Aligned, key: Key) -> Sequence[tuple[int, int]]:
    """(number, micro-batch) of a rank's records of a key, in the order of their calls."""
    numbers = trace.by_key.get(key, ())
    if len(numbers) == 1:
        return ((numbers[0], 0),)
    calls = max(len(numbers) // side.microbatches(key[0]), 1)
    in_order = sorted(numbers, key=lambda n: trace.records[n].call)
    return [(number, turn // calls) for turn, number in enumerate(in_order)]


def _without_sketch(side: Side, place: int, trace: Aligned, number: int, microbatch: int) -> Shown:
    """What a rank shows of a record of which it kept values, statistics alone, or nothing as there was no tensor."""
    record, held = trace.records[number], trace.trace
    shape, dtype = held.shape(number), held.dtype(number)
    depth = None if record.missing else held.depth(number)
    if depth is None or dtype is None:
        return Shown(rank=place, record=record, shape=shape, dtype=dtype or torch.float32)
    if depth == "stats":
        return Shown(rank=place, record=record, shape=shape, dtype=dtype, stats=held.stats(number))
    tensor, samples = held.tensor(number), _samples(side, place, record, microbatch, shape)
    return Shown(
        rank=place,
        record=record,
        shape=shape,
        dtype=dtype,
        sketch=sketch(tensor, record.piece, samples),
        stats=stats_of(tensor),
        by_sample=samples is not None,
    )


def _samples(side: Side, place: int, record: Record, microbatch: int, shape: tuple[int, ...]) -> tuple[str, ...] | None:
    """The samples of an output whose first dim is the batch, by the rule of who records; None where there are none."""
    parts = side.reads.get(record.step, ())
    if record.stage not in BY_SAMPLE or place >= len(parts) or microbatch >= len(parts[place]):
        return None
    samples = parts[place][microbatch]
    return samples if samples and shape and shape[0] == len(samples) else None


def compare_kept(want: Side, got: Side, keys: Collection[Key], eps: float) -> list[Comparison]:
    """One Comparison for each of `keys`, in causal order; `eps` is that of the coarsest dtype of both runs.

    Sketches, statistics, and values of one side alone: errors and floors are 2-norms of whole tensors.
    """
    floors, found = Norms(eps=eps), []
    # Ranks that show the same share what they know of it.
    distinct = {id(own): own for own in [trace.by_key for trace in want.traces]}
    order = {key: place for place, key in enumerate(dict.fromkeys(k for own in distinct.values() for k in own))}

    def place(key: Key) -> tuple[int, int, int]:
        return key[0], STAGES.index(key[1]), order.get(key, len(order))

    # What was read is compared by the digests of its samples.
    wanted = sorted((key for key in keys if key[1] != "batch"), key=place)
    for step, group in groupby(wanted, key=lambda key: key[0]):
        of_step = list(group)
        floors.begin(step)
        work = partial(_of_step, want, got, of_step, floors)
        many = len(of_step) * (len(want.traces) + len(got.traces)) > MANY
        compared = sorted(in_halves(work) if many else work(0, 1), key=lambda one: place(one[0].key))
        for comparison, norm_of_want in compared:
            floors.know(comparison.key, norm_of_want)
            floors.saw(comparison)
            found.append(comparison)
    return found


def _of_step(
    want: Side, got: Side, keys: Sequence[Key], floors: Norms, number: int, count: int
) -> list[tuple[Comparison, float]]:
    """Every `count`-th of a step's keys, from `number` on, in causal order, and the norm of the trusted tensor."""
    floors, found = floors.copy(), []
    for key in keys:
        if key[1] in BY_RELATIVES:
            floors.know(key, norm_of(kept(want, key, statistics=False)))
    for turn, key in enumerate(keys):
        mine, stage = turn % count == number, key[1]
        if not mine:
            # The floors of other tensors rest on this one's.
            floors.floor(key)
            continue
        trusted, seen = _both(want, got, key)
        size = norm_of(trusted)
        floors.know(key, size)
        floor = floors.floor(key)
        comparison = sketched.compare(key, trusted, seen, floor=floor)
        if stage == "backward" and comparison.ratio is not None:
            # Gradients of outputs may carry any one factor; a parameter's gradient says whether it is right.
            comparison = sketched.compare(key, trusted, seen, floor=floor, factor=comparison.ratio)
        found.append((comparison, size))
    return found


def _both(want: Side, got: Side, key: Key) -> tuple[sketched.Side, sketched.Side]:
    """What both sides kept, with statistics where they do not both have sketches."""
    trusted, seen = kept(want, key, statistics=False), kept(got, key, statistics=False)
    if all(one.sketch is not None or one.record.missing for side in (trusted, seen) for one in side.shown):
        return trusted, seen
    return kept(want, key), kept(got, key)


def coarsest(*sides: Side) -> float:
    """One unit in the last place of 1 in the coarsest dtype that a module of these runs computed in."""
    dtypes = {dtype for side in sides for dtype in _dtypes(side)}
    return max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)


def of_weights(side: Side) -> float:
    """One unit in the last place of 1 in the coarsest dtype in which a run keeps its weights; 0 where it shows none."""
    dtypes = _dtypes(side, ("update", "initial-state"))
    return max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point), default=0.0)


def _dtypes(side: Side, stages: Sequence[str] = ("forward", "gradient", "update")) -> set[torch.dtype]:
    found: dict[str, set[torch.dtype]] = {}
    for trace in side.traces:
        if not isinstance(trace, Aligned):
            continue
        for number, record in enumerate(trace.records):
            dtype = None if record.missing else trace.trace.dtype(number)
            if dtype is not None and dtype.is_floating_point:
                found.setdefault(record.stage, set()).add(dtype)
        # Every rank runs the same modules.
        break
    return next((found[stage] for stage in stages if stage in found), set())


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
