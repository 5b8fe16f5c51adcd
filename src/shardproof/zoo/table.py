"""All entries of the zoo, in the order of the catalogue: one line here for each file of bugs."""

from __future__ import annotations

from shardproof.errors import UsageError
from shardproof.spec.patterns import matches
from shardproof.spec.strategies import suggest
from shardproof.zoo import controls, controls_split, controls_state
from shardproof.zoo.bugs import (
    buffers,
    checkpoints,
    data_parallel,
    factors,
    forward,
    initial,
    layout,
    means,
    microbatches,
    norms,
    optimizers,
    partial,
    precision,
    races,
    randomness,
    samples,
    sequence,
    subset,
    tied,
)
from shardproof.zoo.entry import Bug, Control

FAMILIES = (
    data_parallel,
    microbatches,
    factors,
    subset,
    means,
    partial,
    forward,
    layout,
    sequence,
    tied,
    initial,
    norms,
    precision,
    randomness,
    optimizers,
    checkpoints,
    samples,
    buffers,
    races,
)
"""Files of bugs."""


BUGS: tuple[Bug, ...] = tuple(entry for family in FAMILIES for entry in vars(family).values() if isinstance(entry, Bug))
CONTROLS: tuple[Control, ...] = tuple(
    entry
    for file in (controls, controls_split, controls_state)
    for entry in vars(file).values()
    if isinstance(entry, Control)
)


def chosen(patterns: tuple[str, ...]) -> tuple[tuple[Bug, ...], tuple[Control, ...]]:
    """The entries whose name or cause matches one of the patterns; all of them where there is no pattern.

    Raises `UsageError` where a pattern matches nothing.
    """
    names = [*(bug.name for bug in BUGS), *(control.name for control in CONTROLS)]
    causes = sorted({bug.cause for bug in BUGS})
    patterns = tuple(pattern.replace("-", "_") if pattern not in causes else pattern for pattern in patterns)
    for pattern in patterns:
        if not any(matches(known, pattern) for known in (*names, *causes)):
            raise UsageError(f"zoo: {pattern!r} is no entry and no cause; {suggest(pattern, [*names, *causes])}")

    def wanted(*known: str) -> bool:
        return not patterns or any(matches(name, pattern) for name in known for pattern in patterns)

    return (
        tuple(bug for bug in BUGS if wanted(bug.name, bug.cause)),
        tuple(control for control in CONTROLS if wanted(control.name)),
    )
