"""Which samples a run read, rank by rank: what the reference has to replay, and whether the order was right.

Samples are known by their content. A data set may hold the same content several times; each occurrence may be read
once per epoch. A permutation inside one global batch, or a user's own shuffle, is nobody's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

from shardproof.spec.parallelism import Parallelism

RankReads = Sequence[Sequence[Sequence[str]]]
"""Digests that one rank read: [step][micro-batch][sample]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Misread:
    """What is wrong with the samples that were read."""

    cause: str
    """`batch-differs-in-group`, `batch-repeated-across-dp` or `data-order`."""

    step: int
    axis: str
    ranks: tuple[int, ...]
    evidence: str
    fix: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reads:
    """The samples of a run as one device would have read them."""

    batches: tuple[tuple[str, ...], ...]
    """Digests of each step's global batch, in order."""

    sources: tuple[tuple[tuple[int, int], ...], ...]
    """Per step: (rank, micro-batch) pairs whose batches, one after the other, are the global batch."""

    samples: Mapping[int, tuple[tuple[int, ...], ...]]
    """Step -> [data rank][micro-batch] -> samples."""

    split_over_tp: bool
    misread: Misread | None = None
    note: str = ""
    """What could not be judged."""


def digest_of(reads: Reads) -> str:
    """The same for two runs that read the same samples in the same order, up to where the parts were cut."""
    return "|".join(",".join(batch) for batch in reads.batches)


def understand(
    ranks: Sequence[RankReads], parallelism: Parallelism, *, may_split: bool, data: Counter[str] | None
) -> Reads:
    """Put together what all ranks read.

    `may_split` says that the plan splits the batch over `tp`; `data` counts the content of the data set, None where
    it is not known.
    """
    peers = [[dp * parallelism.tp + tp for tp in range(parallelism.tp)] for dp in range(parallelism.dp)]
    differ = any(ranks[rank] != ranks[group[0]] for group in peers for rank in group)
    split = differ and may_split
    readers = peers if split else [group[:1] for group in peers]
    steps = len(ranks[0])
    batches, sources, samples = [], [], {}
    for step in range(steps):
        microbatches = range(len(ranks[0][step]))
        order = [(rank, m) for group in readers for m in microbatches for rank in group]
        own = [(rank, m) for rank, m in order if ranks[rank][step][m]]
        sources.append(tuple(own))
        batches.append(tuple(sample for rank, m in own for sample in ranks[rank][step][m]))
        samples[step] = tuple(
            tuple(sum(len(ranks[rank][step][m]) for rank in group) for m in microbatches) for group in readers
        )
    misread = None
    if differ and not split:
        misread = _differs(ranks, peers)
    if misread is None:
        misread = _out_of_order(ranks, readers, parallelism, data)
    note = ""
    if data is not None and any(sample not in data for batch in batches for sample in batch):
        note = "samples are not found in Experiment.data as they are read, so their order was not judged"
        misread = misread or _alike(ranks, readers, parallelism, data)
    return Reads(
        batches=tuple(batches),
        sources=tuple(sources),
        samples=samples,
        split_over_tp=split,
        misread=misread,
        note=note,
    )


def _differs(ranks: Sequence[RankReads], peers: list[list[int]]) -> Misread:
    step = next(s for s in range(len(ranks[0])) if any(ranks[r][s] != ranks[g[0]][s] for g in peers for r in g))
    groups = [group for group in peers if any(ranks[rank][step] != ranks[group[0]][step] for rank in group)]
    tp = len(peers[0])
    said = "; ".join(f"ranks {', '.join(map(str, group))}" for group in groups)
    return Misread(
        cause="batch-differs-in-group",
        step=step,
        axis="tp",
        ranks=tuple(rank for group in groups for rank in group),
        evidence=f"tensor-parallel peers were fed different samples at step {step}: {said} "
        f"({len(groups)} of {len(peers)} groups of {tp}); tensor parallelism needs a whole group to read the same",
        fix='shard the data over the data axes only: rank mesh["dp"].get_local_rank() of mesh["dp"].size(), '
        "so that all ranks of a tp group read the same samples",
    )


def _out_of_order(
    ranks: Sequence[RankReads], readers: list[list[int]], parallelism: Parallelism, data: Counter[str] | None
) -> Misread | None:
    if data is None:
        return None
    # What the epoch may still hold. Several readings stay open where one epoch passes into the next: a loader may drop
    # what is left, go on into the next epoch, or fill its batch up with samples of the same one (DistributedSampler).
    epochs = [data.copy()]
    for step in range(len(ranks[0])):
        read = {rank: [s for part in ranks[rank][step] for s in part] for group in readers for rank in group}
        every = Counter(sample for samples in read.values() for sample in samples)
        if any(sample not in data for sample in every):
            return None  # transformed on the way, so content cannot be traced back
        most: Counter[str] = reduce(or_, epochs)
        twins = _same_on_data_ranks(read, every, most, parallelism, step)
        if twins is not None:
            return twins
        after = [state for left in epochs for state in _after(every, left, data, filled=len(read) - 1)]
        if not after:
            return _read_twice(every - most, read, (most - every).total(), step)
        epochs = [state for number, state in enumerate(after) if state not in after[:number]]
    return None


def _alike(
    ranks: Sequence[RankReads], readers: list[list[int]], parallelism: Parallelism, data: Counter[str]
) -> Misread | None:
    """Data ranks that read the very same samples, seen without the data set: it holds no sample twice."""
    if max(data.values(), default=0) > 1:
        return None
    for step in range(len(ranks[0])):
        read = {rank: [s for part in ranks[rank][step] for s in part] for group in readers for rank in group}
        # A single sample may be the same by chance, once it has been transformed; a batch of several is not.
        long = {rank: samples for rank, samples in read.items() if len(set(samples)) > 1}
        twice = Counter({sample: 2 for own in long.values() for sample in own})
        found = _same_on_data_ranks(long, twice, Counter(), parallelism, step)
        if found is not None:
            return found
    return None


def _after(every: Counter[str], left: Counter[str], data: Counter[str], *, filled: int) -> list[Counter[str]]:
    """What may be left of the epoch once `every` was read from `left`; empty where that is not in order.

    `filled` is how many samples a sampler may repeat so that all ranks get equally many.
    """
    if every <= left:
        return [(left - every) or data.copy()]
    # While there is a whole batch left, nothing may be read again.
    if left.total() >= every.total() or (every - left - data).total() > filled:
        return []
    return [data - every, data - (every - left), data.copy()]


def _same_on_data_ranks(
    read: Mapping[int, list[str]], every: Counter[str], left: Counter[str], parallelism: Parallelism, step: int
) -> Misread | None:
    # One rank of a tp group reads for all of it, unless the batch is split over tp.
    peers = max(parallelism.world_size // max(len(read), 1), 1)
    for first in read:
        twins = [rank for rank in read if sorted(read[rank]) == sorted(read[first])]
        if len(twins) > 1 and read[first] and any(every[sample] > left[sample] for sample in read[first]):
            return Misread(
                cause="batch-repeated-across-dp",
                step=step,
                axis=data_axis(parallelism),
                ranks=tuple(rank + peer for rank in twins for peer in range(peers)),
                evidence=f"data ranks {', '.join(map(str, twins))} read the very same {len(read[first])} samples at "
                f"step {step}, more often than the data set holds them",
                fix='give each data rank its own part of the global batch, by mesh["dp"].get_local_rank()',
            )
    return None


def _read_twice(again: Counter[str], read: Mapping[int, list[str]], unread: int, step: int) -> Misread:
    ranks = tuple(sorted(rank for rank, samples in read.items() if any(sample in again for sample in samples)))
    return Misread(
        cause="data-order",
        step=step,
        axis="dp",
        ranks=ranks,
        evidence=f"{again.total()} samples of step {step} had been read before in the same epoch, "
        f"while {unread} had not been read at all",
        fix="let the data ranks together read every sample once per epoch (check the sampler's rank, world size, "
        "and set_epoch)",
    )


def data_axis(parallelism: Parallelism) -> str:
    """The name of the data axis that is in use; `dp` where both are."""
    if parallelism.dp_replicate > 1 and parallelism.dp_shard > 1:
        return "dp"
    return "dp_shard" if parallelism.dp_shard > 1 else "dp_replicate"
