"""What the traces of a right run and of its reference tell about faults: where they show, and what hides them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from shardproof.compare.measure import distance, largest, scale, ulp
from shardproof.trace.record import Record
from shardproof.trace.trace import Trace
from shardproof.train.faults.facts import Facts


def told_by(known: Facts, reference: Trace, floors: Mapping[int, float], ranks: Sequence[Trace]) -> Facts:
    """`known`, and what the traces say beside it; `floors` are the reference's, by number of the record."""
    seen = {number: record for number, record in enumerate(reference.records) if not (record.missing or record.unknown)}
    state = (n for n, record in seen.items() if record.stage == "optimizer-state" and record.step == 0)
    buffers = {record.name: n for n, record in seen.items() if record.stage == "buffer"}
    norms = (n for n, record in seen.items() if record.stage == "grad-norm" and record.part == "norm")
    own = {
        n: record
        for n, record in seen.items()
        if record.name in known.pieces[0] and not record.part and record.step < 1
    }
    initial = {record.name: reference.tensor(n) for n, record in own.items() if record.stage == "initial-state"}
    return replace(
        known,
        gradients={
            record.name: _floors(scale(reference.tensor(n)), n, reference, floors)
            for n, record in own.items()
            if record.stage == "gradient"
        },
        moved={
            record.name: _floors(largest(distance(reference.tensor(n), initial[record.name])), n, reference, floors)
            for n, record in own.items()
            if record.stage == "update" and record.name in initial
        },
        largest=_largest(known, seen, reference),
        constant=frozenset(name for name, value in initial.items() if bool((value == value.reshape(-1)[:1]).all())),
        buffers=tuple(name for name, n in buffers.items() if reference.tensor(n).dtype != torch.bool),
        has_state=any(scale(reference.tensor(n)) > 0 for n in state),
        counts=_counts(known, ranks),
        norms=tuple(float(reference.tensor(n)) for n in norms),
    )


def _largest(known: Facts, seen: Mapping[int, Record], reference: Trace) -> dict[str, float]:
    """Over all values that a forward pass uses: not those that the last step leaves behind."""
    found: dict[str, float] = {}
    for n, record in seen.items():
        used = record.stage in ("initial-state", "update") and record.step < known.steps - 1
        if used and not record.part and record.name in known.pieces[0]:
            found[record.name] = max(found.get(record.name, 0.0), scale(reference.tensor(n)))
    return found


def _floors(size: float, number: int, reference: Trace, floors: Mapping[int, float]) -> float:
    floor = max(floors.get(number, 0.0), ulp(reference.tensor(number)))
    if size == 0:
        return 0.0
    return size / floor if floor > 0 else math.inf


def _counts(known: Facts, ranks: Sequence[Trace]) -> tuple[tuple[float, ...], ...]:
    found: dict[int, list[float]] = {}
    # Tensor-parallel peers hold the same parts, so that one of them speaks for all.
    for trace in ranks[:: known.parallelism.tp]:
        for number, record in enumerate(trace.records):
            if record.stage == "loss" and record.part == "count":
                found.setdefault(record.step, []).append(float(trace.tensor(number)))
    return tuple(tuple(found[step]) for step in sorted(found))
