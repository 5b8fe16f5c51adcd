"""Batches: TP peers must read the same samples, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import torch

from shardproof.compare.measure import Pair, by_rank, furthest, worst
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.compare.view import Key, Observed


def compare(key: Key, observed: Observed) -> Comparison:
    """One leaf of the batch (inputs, labels ...) over all ranks and micro-batches of a step.

    Which samples data ranks may read is a question of whole samples, answered in `compare.reads`.
    """
    step, stage, name, part = key
    base = Comparison(step=step, stage=stage, name=name, part=part, verdict=Verdict.EQUAL)
    if observed.batch_split_over_tp:
        return replace(base, layout="tp: slices of dim 0")
    shown = {}
    for rank, record, tensor in observed.held(key):
        if tensor is not None:
            shown[rank, record.call] = tensor
    pairs = []
    for (rank, call), tensor in shown.items():
        first = rank - observed.parallelism.coordinates(rank)["tp"]
        other = shown.get((first, call))
        if other is None or (tensor.shape == other.shape and torch.equal(tensor, other)):
            continue
        if tensor.shape != other.shape:
            reason = f"rank {rank} reads shape {tuple(tensor.shape)}, rank {first} {tuple(other.shape)}"
            return replace(base, verdict=Verdict.DIFFERENT, error=float("inf"), ranks=(first, rank), reason=reason)
        pairs += [Pair(rank=rank, got=tensor, want=other), Pair(rank=first, got=other, want=other)]
    if not pairs:
        return base
    errors = [(pair.rank, furthest(pair.got, pair.want)) for pair in pairs]
    return replace(
        base,
        verdict=Verdict.DIFFERENT,
        error=max(error for _, error in errors),
        errors=by_rank(errors),
        reason="ranks of one tensor-parallel group read different samples",
        ranks=tuple(sorted({pair.rank for pair in pairs})),
        samples=tuple(worst([pair for pair in pairs if pair.got is not pair.want])),
        shape=tuple(pairs[0].got.shape),
    )
