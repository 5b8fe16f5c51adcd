"""What is to be recorded: which steps, which stages how deep, which names."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from shardproof.errors import PatternError, UsageError
from shardproof.spec.patterns import matches, select
from shardproof.spec.stages import STAGES
from shardproof.spec.strategies import suggest

Depth = Literal["full", "sketch", "stats"]
"""All values; a sketch and statistics; statistics alone."""

DEPTHS: tuple[Depth, ...] = get_args(Depth)

RECORDED = tuple(stage for stage in STAGES if stage != "checkpoint")
"""Stages that a training loop shows by itself."""

NAMELESS = frozenset({"batch", "loss"})
"""Stages that belong to the whole step: `names` does not leave them out, as runs are aligned by them."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Some optimizer steps, counted from 0."""

    chosen: Container[int] | None
    """None is all of them."""
    last: int | None

    @property
    def text(self) -> str:
        """As they are written in the header of a trace."""
        if isinstance(self.chosen, frozenset):
            return ", ".join(map(str, sorted(self.chosen)))
        if isinstance(self.chosen, range) and self.chosen.step == 1:
            return f"{self.chosen[0]}-{self.chosen[-1]}" if len(self.chosen) > 1 else str(self.chosen[0])
        return "all" if self.chosen is None else str(self.chosen)

    def __contains__(self, step: int) -> bool:
        return self.chosen is None or step in self.chosen


def read_steps(steps: Iterable[int] | None) -> Steps:
    """Raises `UsageError` for what is no collection of steps, or an empty one."""
    if steps is None:
        return Steps(None, None)
    if isinstance(steps, int) or not isinstance(steps, Iterable) or isinstance(steps, str):
        raise UsageError(f"steps={steps!r}: give the steps to record as range(3), [0, 100], or None for all")
    chosen = steps if isinstance(steps, range) else frozenset(steps)
    wrong = [step for step in (chosen[:1] if isinstance(chosen, range) else chosen) if not _is_step(step)]
    if wrong:
        raise UsageError(f"steps: {wrong[0]!r} is no step; optimizer steps are counted from 0 when record is entered")
    if not chosen:
        raise UsageError(f"steps={steps!r} holds no step, so that nothing would be recorded; give range(3), or None")
    return Steps(chosen, max(chosen))


def _is_step(step: object) -> bool:
    return isinstance(step, int) and not isinstance(step, bool) and step >= 0


def read_depths(what: str | Mapping[str, str]) -> dict[str, Depth]:
    """Stage -> how deep it is recorded; stages that are left out are not. Raises `UsageError` for unknown words."""
    if isinstance(what, str):
        return dict.fromkeys(RECORDED, _depth(what, "what"))
    if not isinstance(what, Mapping) or not what:
        raise UsageError(f"what={what!r}: give one of {', '.join(DEPTHS)}, or a mapping from stages to these")
    unknown = [stage for stage in what if stage not in RECORDED]
    if unknown:
        raise UsageError(f"what: there is no stage {unknown[0]!r}; {suggest(str(unknown[0]), RECORDED)}")
    return {stage: _depth(depth, f"what[{stage!r}]") for stage, depth in what.items()}


def _depth(word: str, place: str) -> Depth:
    for depth in DEPTHS:
        if word == depth:
            return depth
    raise UsageError(f"{place}={word!r}: there is no such depth; {suggest(str(word), DEPTHS)}")


@dataclass(frozen=True, slots=True)
class Names:
    """Wildcard patterns over canonical names, as in `spec.patterns`; a lone `*` is every name."""

    patterns: tuple[str, ...]

    def __contains__(self, name: str) -> bool:
        return any(pattern == "*" or matches(name, pattern) for pattern in self.patterns)

    def check(self, known: Iterable[str]) -> None:
        """Raises `PatternError` for a pattern that none of the `known` names of a model matches."""
        known = list(known)
        for pattern in self.patterns:
            if pattern != "*" and not any(matches(name, pattern) for name in known):
                select(known, pattern, field="names", kind="module, parameter or buffer")


def read_names(names: str | Iterable[str]) -> Names:
    """Raises `PatternError` for what are no patterns."""
    patterns = (names,) if isinstance(names, str) else tuple(names)
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise PatternError(f"names={names!r}: give patterns over names, as ('blocks.0.*', 'head'), or ('*',) for all")
    return Names(patterns)
