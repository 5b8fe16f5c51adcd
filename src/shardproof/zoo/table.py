"""All entries of the zoo, in the order of the catalogue: one line here for each file of bugs."""

from __future__ import annotations

from shardproof.errors import UsageError
from shardproof.spec.patterns import matches
from shardproof.spec.strategies import suggest
from shardproof.zoo import controls
from shardproof.zoo.bugs import data_parallel, factors, means, microbatches
from shardproof.zoo.entry import Bug, Control

FAMILIES = (data_parallel, microbatches, factors, means)
"""Files of bugs."""


BUGS: tuple[Bug, ...] = tuple(entry for family in FAMILIES for entry in vars(family).values() if isinstance(entry, Bug))
CONTROLS: tuple[Control, ...] = tuple(entry for entry in vars(controls).values() if isinstance(entry, Control))


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
