"""Two recordings in words: what each run was, and what of one has no partner in the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from shardproof.align.shapes import SHAPED
from shardproof.align.side import Side
from shardproof.align.told import Told
from shardproof.align.traces import Aligned
from shardproof.compare.split import sharded_over
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.spec.parallelism import AXES

NAMED = 4
"""Names without a partner that are listed."""


def described(side: Side, facts: Mapping[int, Told], steps: Sequence[int]) -> str:
    """`runs/tp2: 4 ranks, dp_replicate=2,tp=2, 2 micro-batches, DistributedDataParallel; 6 of 9 parameters split`."""
    parallelism = side.layout.parallelism
    said = [f"{parallelism.world_size} rank{'s' if parallelism.world_size > 1 else ''}"]
    if parallelism.world_size > 1:
        degrees = ",".join(f"{axis}={n}" for axis, n in zip(AXES, parallelism.degrees, strict=True) if n > 1)
        said.append(f"{degrees} ({side.layout.told_by})")
    many = {side.microbatches(step) for step in steps}
    if many - {1}:
        said.append(f"{' or '.join(map(str, sorted(many)))} micro-batches a step")
    skipped = max((len(told.skipped) for told in facts.values()), default=0)
    if skipped:
        said.append(f"{skipped} attempt{'s' if skipped > 1 else ''} at a step skipped by a gradient scaler, left out")
    wrappers = sorted({wrapper for told in facts.values() for wrapper in told.wrappers})
    if wrappers:
        said.append(", ".join(wrappers))
    if parallelism.world_size > 1:
        said.append(_split(side))
    return ", ".join(said)


def _split(side: Side) -> str:
    pieces = [
        {r.name: r.piece for r in trace.records if r.stage == "gradient" and not r.part and r.piece is not None}
        for trace in side.traces
    ]
    if not all(pieces):
        return "how its parameters lie is not known"
    split = {axis: n for axis, n in sharded_over(pieces, side.layout.parallelism).items() if n}
    if not split:
        return f"each rank holds all {len(pieces[0])} parameters whole"
    said = ", ".join(f"{n} over {axis}" for axis, n in split.items())
    return f"of {len(pieces[0])} parameters {said} split"


def without_partner(comparisons: Sequence[Comparison], want: str, got: str) -> Iterator[str]:
    """What only one of the two shows, by name; tensors that are the same in each step are told once."""
    for reason, owner, other in (
        ("the reference has no such tensor", got, want),
        ("this run shows no such tensor", want, got),
    ):
        names = dict.fromkeys(
            f"{c.name}{'' if c.part.startswith('[') else ' '}{c.part}".rstrip()
            for c in comparisons
            if c.verdict is Verdict.NOT_CHECKED and c.reason == reason
        )
        if names:
            listed = ", ".join(list(names)[:NAMED]) + (", ..." if len(names) > NAMED else "")
            yield f"{len(names)} names of {owner} have no partner in {other}: {listed}"


def dtypes(want: Side, got: Side) -> str:
    """`float32`, or `float64 against float32`: what the parameters of the two were kept in."""
    said = [_dtype(side) for side in (got, want)]
    return said[0] if said[0] == said[1] else " against ".join(said)


def _dtype(side: Side) -> str:
    for trace in side.traces:
        if isinstance(trace, Aligned):
            for number, record in enumerate(trace.records):
                dtype = trace.trace.dtype(number)
                if record.stage in SHAPED and not record.part and dtype is not None and dtype.is_floating_point:
                    return str(dtype).removeprefix("torch.")
    return "unknown dtype"
