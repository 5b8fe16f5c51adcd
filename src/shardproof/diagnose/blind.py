"""What an experiment cannot show because of what it is itself: said beside parity, with what would show it.

Only where the check is really blind. Adam and clipping hide a factor on the gradients, but gradients are compared
before both; a norm that starts as 1 hides nothing from its gradient; biases that start as 0 are numbers after the first
step, which float64 tells from twice that number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from shardproof.compare.reads import Reads
from shardproof.spec.parallelism import Parallelism
from shardproof.trace.checksums import same_bits
from shardproof.trace.record import Record
from shardproof.trace.trace import Trace

SHOWN = 4
"""Names or strategies listed in a warning: enough to see what kind they are of."""

Counts = Mapping[int, tuple[float, ...]]
"""Step -> what each part of the batch is divided by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """What a run of the reference had to show."""

    steps: int
    zero: tuple[str, ...] = ()
    """Parameters that were nothing but zeros in every forward pass."""

    moved: bool = True
    """Whether any parameter was another after the last step than before the first."""

    norms: tuple[float, ...] = ()
    """Norm of the gradients at each step, where they were clipped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lived:
    """One layout that was checked: how its batches were cut."""

    parallelism: Parallelism
    reads: Reads
    counts: Counts
    """Empty where the loss is no `LossSum`."""


def learn(reference: Trace, steps: int, dtype: torch.dtype) -> Lesson:
    """Look through a trace of the reference, which ran `steps` steps in `dtype`."""
    # Buffers and an optimizer's state have initial values as well; only weights are updated.
    last = {r.name: number for number, r in _weights(reference, "update", steps - 1)}
    started = {r.name: number for number, r in _weights(reference, "initial-state", -1) if r.name in last}
    # The weights of the last forward pass. In bfloat16 a few steps from zero are lost beside the other numbers.
    before = started
    if steps > 1 and dtype != torch.bfloat16:
        before = {r.name: number for number, r in _weights(reference, "update", steps - 2)}
    zero = [n for n in started if not _any(reference, started[n]) and not _any(reference, before.get(n, started[n]))]
    moved = any(not same_bits(reference.tensor(started[n]), reference.tensor(last[n])) for n in started)
    norms = [
        float(reference.tensor(number))
        for number, record in enumerate(reference.records)
        if record.stage == "grad-norm" and record.part == "norm"
    ]
    return Lesson(steps=steps, zero=tuple(zero), moved=moved, norms=tuple(norms))


def counts_of(traces: Sequence[Trace], tp: int) -> Counts:
    """What each part of every step's batch counted, as a `LossSum` says."""
    found: dict[int, tuple[float, ...]] = {}
    # The ranks of a tp group count the same part.
    for trace in traces[::tp]:
        for number, record in enumerate(trace.records):
            if record.stage == "loss" and record.part == "count" and not record.missing:
                found[record.step] = (*found.get(record.step, ()), float(trace.tensor(number)))
    return found


def blind_spots(
    lesson: Lesson,
    lived: Sequence[Lived],
    *,
    microbatches: int,
    own_layout: bool,
    own_step: bool,
    max_grad_norm: float | None,
) -> tuple[str, ...]:
    """Warnings, the widest blind spot first.

    `own_layout` and `own_step` say whether `parallelize` and `train_step` are the user's: what they could do wrong, and
    shardproof's own cannot, needs an experiment that would show it.
    """
    found = [_same_data(lived, microbatches), _still(lesson), *_zero(lesson)]
    if own_step:
        found += [_equal_counts(lived), _never_clipped(lesson, max_grad_norm)]
    if own_step or own_layout:
        found.append(_equal_sizes([one.parallelism for one in lived], microbatches))
    return tuple(warning for warning in found if warning)


def _same_data(lived: Sequence[Lived], microbatches: int) -> str:
    blind = [one.parallelism.strategy for one in lived if _parts(one, microbatches) and _alike(one, microbatches)]
    if not blind:
        return ""
    return (
        f"all parts of each batch hold the very same samples ({_listed(blind)}): gradients that are not reduced, and a "
        "rank or micro-batch that is left out, cannot be seen; use data whose samples differ"
    )


def _parts(one: Lived, microbatches: int) -> bool:
    return one.parallelism.dp * microbatches > 1


def _alike(one: Lived, microbatches: int) -> bool:
    return all(len(set(_cut(one, step))) == 1 for step in range(len(one.reads.batches)))


def _cut(one: Lived, step: int) -> Iterator[tuple[str, ...]]:
    """The samples of each part of a step's batch, in no order."""
    at = 0
    for row in one.reads.samples[step]:
        for count in row:
            if count:
                yield tuple(sorted(one.reads.batches[step][at : at + count]))
            at += count


def _still(lesson: Lesson) -> str:
    if lesson.moved:
        return ""
    steps = "the only step" if lesson.steps == 1 else f"{lesson.steps} steps"
    return (
        f"no weight changed in {steps}: nothing of the optimizer was seen, nor of any step that starts from other "
        "weights; use a learning rate above 0 (a warm-up may start at 0)"
    )


def _zero(lesson: Lesson) -> Iterator[str]:
    again = "faults that begin with the second step (gradients left over, optimizer state, schedules) cannot be seen"
    if lesson.zero:
        many = f"{len(lesson.zero)} parameters are" if len(lesson.zero) > 1 else "a parameter is"
        yield (
            f"{many} all zero in every forward pass ({_listed(lesson.zero)}): what is added twice, left out or "
            f"multiplied there cannot be seen; draw the initial values at random{_or_steps(lesson)}"
        )
    if lesson.steps == 1:
        yield f"one step was checked: {again}; use --steps 3"


def _or_steps(lesson: Lesson) -> str:
    return ", or check more steps" if lesson.steps == 1 and lesson.moved else ""


def _equal_counts(lived: Sequence[Lived]) -> str:
    several = [one for one in lived if any(len(counts) > 1 for counts in one.counts.values())]
    if not several or any(len(set(counts)) > 1 for one in several for counts in one.counts.values()):
        return ""
    return (
        f"every part of each batch counts the same ({next(iter(several[0].counts.values()))[0]:g}) in LossSum: a mean "
        "of the parts' means in train_step cannot be seen; use samples with unequal counts"
    )


def _never_clipped(lesson: Lesson, limit: float | None) -> str:
    if limit is None or not lesson.norms or max(lesson.norms) > limit:
        return ""
    return (
        f"max_grad_norm {limit:g} is never reached (the largest norm is {max(lesson.norms):.3g}): clipping in "
        "train_step was not exercised; lower it for the check"
    )


def _equal_sizes(layouts: Sequence[Parallelism], microbatches: int) -> str:
    """Two sizes that are the same in every layout: to divide by one of them is to divide by the other."""
    sizes = [
        {"data ranks": layout.dp, "tp": layout.tp, "micro-batches": microbatches}
        for layout in layouts
        if layout.world_size > 1
    ]
    pairs = [("data ranks", "tp"), ("data ranks", "micro-batches"), ("tp", "micro-batches")]
    same = [
        (one, other)
        for one, other in pairs
        if any(size[one] > 1 for size in sizes) and all(size[one] == size[other] for size in sizes)
    ]
    if not same:
        return ""
    said = " and ".join(dict.fromkeys(name for pair in same for name in pair))
    number = max(size[same[0][0]] for size in sizes)
    return (
        f"{said} are equally many ({number}) in every layout that was checked: dividing by the wrong one cannot be "
        "seen; check another layout too, as --strategy tp=2,dp_shard=3"
    )


def _weights(trace: Trace, stage: str, step: int) -> Iterator[tuple[int, Record]]:
    for number, record in enumerate(trace.records):
        if (record.stage, record.step, record.part) == (stage, step, "") and not record.missing:
            yield number, record


def _any(trace: Trace, number: int) -> bool:
    return bool(trace.tensor(number).any())


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
