"""All entries of the zoo, in the order of the catalogue: one line here for each file of bugs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from shardproof.errors import UsageError
from shardproof.spec.patterns import matches
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


def chosen(patterns: Iterable[str] = ()) -> tuple[tuple[Bug, ...], tuple[Control, ...]]:
    """The entries whose name or cause matches one of the patterns; all of them where there is no pattern.

    In a name, `-` is read as `_`. Raises `UsageError` where a pattern matches nothing.
    """
    patterns = tuple(patterns)
    entries: tuple[Bug | Control, ...] = (*BUGS, *CONTROLS)
    for pattern in patterns:
        if not any(_fits(entry, pattern) for entry in entries):
            known = {entry.name for entry in entries} | {bug.cause for bug in BUGS}
            near = difflib.get_close_matches(pattern.lower(), sorted(known), n=3, cutoff=0.5)
            meant = f"did you mean {' or '.join(near)}? " if near else ""
            raise UsageError(f"zoo: {pattern!r} is no entry and no cause; {meant}--list shows all of them")
    return (
        tuple(bug for bug in BUGS if not patterns or any(_fits(bug, pattern) for pattern in patterns)),
        tuple(control for control in CONTROLS if not patterns or any(_fits(control, pattern) for pattern in patterns)),
    )


def _fits(entry: Bug | Control, pattern: str) -> bool:
    return matches(entry.name, pattern.replace("-", "_")) or (
        isinstance(entry, Bug) and matches(entry.cause, pattern.replace("_", "-"))
    )
