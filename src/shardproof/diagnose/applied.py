"""Whether a strategy did what its name says, judged by where parameters really lay when the first step was over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardproof.compare.split import Pieces, sharded_over, split_names
from shardproof.diagnose.finding import Finding
from shardproof.spec.parallelism import Parallelism


def check_applied(
    ranks: Sequence[Pieces], collectives: Mapping[str, Mapping[str, int]], parallelism: Parallelism
) -> Finding | None:
    """A `strategy-not-applied` finding where an axis that was declared did nothing, or the wrong thing."""
    found = sharded_over(ranks, parallelism)
    first = next(iter(ranks[0]), "(root)")
    total = len(ranks[0])
    everyone = tuple(range(parallelism.world_size))
    ran = _said(collectives)
    if parallelism.dp_shard > 1 and not found["dp_shard"]:
        return _finding(
            "dp_shard",
            first,
            everyone,
            f"dp_shard={parallelism.dp_shard} was declared, but none of {total} parameters is sharded over it: every "
            f"rank holds whole copies, as under plain data parallelism. Collectives of the first step: {ran}",
            "shard the model (fully_shard or FSDP over mesh['dp_shard']), or declare dp_replicate instead",
        )
    if parallelism.tp > 1 and not found["tp"] and not _reduces_over_tp(collectives):
        return _finding(
            "tp",
            first,
            everyone,
            f"tp={parallelism.tp} was declared, but none of {total} parameters is split over it and no collective ran "
            f"over it. Collectives of the first step: {ran}",
            "split the model over mesh['tp'] (parallelize_module with a plan), or declare more data-parallel ranks",
        )
    if parallelism.dp_replicate > 1 and found["dp_replicate"]:
        names = split_names("dp_replicate", ranks, parallelism)
        return _finding(
            "dp_replicate",
            names[0],
            everyone,
            f"dp_replicate={parallelism.dp_replicate} was declared to hold replicas, but {len(names)} of {total} "
            f"parameters are sharded over it. Collectives of the first step: {ran}",
            "shard over mesh['dp_shard'] alone (HSDP: mesh['dp_replicate', 'dp_shard']), or declare dp_shard instead",
        )
    return None


def _reduces_over_tp(collectives: Mapping[str, Mapping[str, int]]) -> bool:
    return any("tp" in axes.split("+") for axes in collectives)


def _said(collectives: Mapping[str, Mapping[str, int]]) -> str:
    said = [f"{count} {name} over {axis}" for axis, names in collectives.items() for name, count in names.items()]
    return ", ".join(said) or "none"


def _finding(axis: str, where: str, ranks: tuple[int, ...], evidence: str, fix: str) -> Finding:
    return Finding(
        cause="strategy-not-applied",
        stage="initial-state",
        where=where,
        axis=axis,
        factor=None,
        ranks=ranks,
        step=-1,
        evidence=evidence,
        fix=fix,
    )
