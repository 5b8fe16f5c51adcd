"""Losses: every rank computes that of its own part, and logs its own or the mean over data ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shardproof.compare.measure import DROWNED, Outcome, Pair, drowned, judge, scale, ulp, wide
from shardproof.compare.pending import settled
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.compare.view import Key, Observed, Reference
from shardproof.parallel.names import ROOT
from shardproof.trace.record import Record

Held = list[tuple[Record, Tensor]]

NOT_CALLED = "the loss was not computed through Step.loss"

NOT_EACH = "the loss was not called once per micro-batch through Step.loss"

BACKWARD = "backward"
"""What backward was called on, micro-batch by micro-batch: divided already by whatever a loop divides it by."""


def compare(key: Key, observed: Observed, reference: Reference) -> Comparison:
    """One kind of loss (`local`, `total`, `count`, `backward`, `logged`) over all ranks and micro-batches."""
    step, stage, name, part = key
    base = Comparison(step=step, stage=stage, name=name, part=part, verdict=Verdict.NOT_CHECKED)
    wants = reference.tensors(key)
    per_rank = _shown(key, observed)
    if not wants or not per_rank:
        return replace(base, reason=_no_partner(part, bool(wants)))
    # A loss that is called several times a batch counts once, as the sum of its calls does in the reference.
    want = (torch.stack([wide(want) for want in wants]) * _fed(step, part, observed, reference)).sum().reshape(())
    floor = max(reference.floor(key), ulp(wants[0]))
    if len(per_rank) != observed.parallelism.world_size:
        return replace(base, reason=f"shown on {len(per_rank)} of {observed.parallelism.world_size} ranks")
    if part == "logged":
        outcome = _logged(per_rank, want, floor, observed, step)
    else:
        counts = {len(entries) for entries in per_rank.values()}
        if counts != {observed.microbatches * reference.calls(step, len(wants))}:
            return replace(base, reason=NOT_EACH)
        outcome = _combined(per_rank, want, floor, observed, part)
    lost = outcome.verdict is Verdict.DIFFERENT and drowned(outcome.error, floor, scale(want))
    return replace(
        base,
        verdict=Verdict.NOT_CHECKED if lost else outcome.verdict,
        reason=DROWNED if lost else "",
        error=outcome.error,
        floor=floor,
        ranks=outcome.ranks,
        ratio=outcome.ratio,
        samples=outcome.samples,
        errors=outcome.errors,
    )


def _fed(step: int, part: str, observed: Observed, reference: Reference) -> Tensor:
    """The share of each of the reference's local losses in its mean: 1, unless it was fed part by part."""
    if not reference.parts or part != "local":
        return torch.ones(())
    counts = [observed.part(step, *fed) for fed in reference.parts[step]]
    return torch.tensor([count / total for _, count, total in counts], dtype=torch.float64)


def combined(key: Key, observed: Observed) -> Tensor | None:
    """The loss of the whole batch as a sharded run computed it, shape `()`; None where it was not computed."""
    per_rank = _shown(key, observed)
    if len(per_rank) != observed.parallelism.world_size:
        return None
    part = key[3]
    if part == "logged":
        values = {rank: wide(entries[0][1]).reshape(()) for rank, entries in per_rank.items()}
    else:
        values = _totals(per_rank, observed, part)
    mean = part not in ("total", "count")
    return _over_data(values, torch.zeros(()), observed, mean=mean)[0].got


def _shown(key: Key, observed: Observed) -> dict[int, Held]:
    """Rank -> its losses in the order of the micro-batches; of a DTensor, what it stands for."""
    calls: dict[int, dict[int, tuple[Record, Tensor]]] = {}
    for rank, record, tensor in observed.held(key):
        if tensor is not None:
            calls.setdefault(record.call, {})[rank] = (record, tensor)
    per_rank: dict[int, Held] = {}
    for shown in calls.values():
        pieces = {rank: record.piece for rank, (record, _) in shown.items()}
        done = settled({rank: tensor for rank, (_, tensor) in shown.items()}, pieces)
        for rank, (record, _) in shown.items():
            per_rank.setdefault(rank, []).append((record, done[rank]))
    return per_rank


def _no_partner(part: str, in_reference: bool) -> str:
    if in_reference and part != "logged":
        return NOT_CALLED
    return "this run shows no such tensor" if in_reference else "the reference has no such tensor"


def _combined(per_rank: dict[int, Held], want: Tensor, floor: float, observed: Observed, part: str) -> Outcome:
    """Local losses make up the reference's: weighted over micro-batches, averaged (or summed) over data ranks."""
    mean = part not in ("total", "count")
    return judge(_over_data(_totals(per_rank, observed, part), want, observed, mean=mean), floor)


def _totals(per_rank: dict[int, Held], observed: Observed, part: str) -> dict[int, Tensor]:
    """Each rank's loss over its micro-batches."""
    return {
        rank: torch.stack([_share(rank, record, tensor, observed, part) for record, tensor in entries]).sum()
        for rank, entries in per_rank.items()
    }


def _share(rank: int, record: Record, tensor: Tensor, observed: Observed, part: str) -> Tensor:
    data_rank = observed.parallelism.coordinates(rank)["dp"]
    microbatch = min(record.call, observed.microbatches - 1)
    _, count, total = observed.part(record.step, data_rank, microbatch)
    if part in ("total", "count", BACKWARD):
        return wide(tensor) * (1.0 if count else 0.0)
    return wide(tensor) * (count * observed.parallelism.dp / total)


def _over_data(values: dict[int, Tensor], want: Tensor, observed: Observed, *, mean: bool) -> list[Pair]:
    """What the data ranks together say, once per place on the `tp` axis: TP peers must agree."""
    parallelism = observed.parallelism
    peers = [[r for r in values if parallelism.coordinates(r)["tp"] == tp] for tp in range(parallelism.tp)]
    if observed.batch_split_over_tp:
        # Every rank has samples of its own, so all of them together make the batch.
        peers = [sorted(values)]
    pairs = []
    for group in peers:
        stacked = torch.stack([values[rank] for rank in group])
        got = stacked.mean() if mean else stacked.sum()
        pairs += [Pair(rank=rank, got=got, want=want) for rank in group]
    return pairs


def _logged(per_rank: dict[int, Held], want: Tensor, floor: float, observed: Observed, step: int) -> Outcome:
    """Either every rank logs the mean over data ranks, or each its own part's, of which that is the (weighted) mean."""
    values = {rank: wide(entries[0][1]).reshape(()) for rank, entries in per_rank.items()}
    everywhere = judge([Pair(rank=rank, got=value, want=want) for rank, value in values.items()], floor)
    weighted = {rank: value * _weight(rank, step, observed) for rank, value in values.items()}
    ways = [judge(_over_data(logged, want, observed, mean=True), floor) for logged in (values, weighted)]
    together = min(ways, key=lambda outcome: outcome.error if outcome.error == outcome.error else float("inf"))
    # Whichever fits better: in low precision a part's own loss may lie close to the mean of all.
    best = everywhere if everywhere.error <= together.error else together
    if best.verdict is not Verdict.DIFFERENT:
        return best
    # With ragged counts the mean of the parts' means is not the mean: each is held against its own sum and count.
    own = _own_means(step, observed)
    alone = judge([Pair(rank=rank, got=value, want=own[rank]) for rank, value in values.items() if rank in own], floor)
    return alone if len(own) == len(values) and alone.verdict is not Verdict.DIFFERENT else best


def _weight(rank: int, step: int, observed: Observed) -> float:
    """Share of a data rank's samples in the batch, over the share of one rank of equals."""
    data_rank = observed.parallelism.coordinates(rank)["dp"]
    parts = [observed.part(step, data_rank, m) for m in range(observed.microbatches)]
    return sum(count for _, count, _ in parts) * observed.parallelism.dp / parts[0][2]


def _own_means(step: int, observed: Observed) -> dict[int, Tensor]:
    """Rank -> total over count of its own `LossSum`s, which are compared by themselves."""
    sums = {part: _shown((step, "loss", ROOT, part), observed) for part in ("total", "count")}
    totals = {part: _totals(shown, observed, part) for part, shown in sums.items()}
    # A part without anything that counts has a sum of 0, and logs it.
    counts = {rank: torch.where(count == 0, 1.0, count) for rank, count in totals["count"].items()}
    return {rank: total / counts[rank] for rank, total in totals["total"].items() if rank in counts}
