"""What a recording says of its run beside its tensors: the facts that each rank wrote, read with suspicion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardproof.align.understood import groups_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """The facts of one rank."""

    ties: tuple[tuple[str, ...], ...] = ()
    """Groups of parameter names that share one storage."""
    strangers: tuple[str, ...] = ()
    """What the optimizer holds that is not the model's."""
    left_behind: tuple[str, ...] = ()
    """Trainable parameters that no optimizer holds."""
    wrappers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Class of a wrapper -> the modules that it wraps."""
    axes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Mesh axis -> the ranks of this rank's group."""
    declared: str = ""
    """The strategy that the run meant to use, where somebody said so."""
    skipped: tuple[int, ...] = ()
    """Steps that a gradient scaler skipped, once for each time that it did; they were tried again."""
    disturbed: bool = False
    """Whether the run was disturbed on purpose, to measure a noise floor."""


def told(events: Sequence[Mapping[str, Any]], rename: Callable[[str], str] = str) -> Told:
    """The last word on each fact among the events of a rank; whatever is not shaped as it should be says nothing."""
    facts: dict[str, Any] = {}
    for event in events:
        if event.get("event") == "layout":
            facts.update(event)
    skipped = [event.get("step") for event in events if event.get("event") == "skipped"]
    ties = facts.get("ties")
    wrappers = facts.get("wrappers")
    declared = facts.get("declared")
    return Told(
        ties=tuple(sorted(tuple(sorted(map(rename, named))) for group in ties if len(named := _texts(group)) > 1))
        if isinstance(ties, list)
        else (),
        strangers=_texts(facts.get("strangers")),
        left_behind=tuple(rename(name) for name in _texts(facts.get("left_behind"))),
        wrappers={str(kind): _texts(names) for kind, names in wrappers.items()}
        if isinstance(wrappers, Mapping)
        else {},
        axes=groups_of(facts),
        declared=declared if isinstance(declared, str) else "",
        skipped=tuple(step for step in skipped if type(step) is int),
        disturbed=bool(facts.get("disturb")),
    )


def _texts(value: object) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list | tuple) else ()
