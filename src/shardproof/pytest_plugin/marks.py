"""What the marks `ranks` and `world_size` of a test ask for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from shardproof.errors import StrategyError, UsageError
from shardproof.pytest_plugin.messages import Crew
from shardproof.spec.parallelism import AXES, Parallelism
from shardproof.spec.strategies import parse

if TYPE_CHECKING:
    from collections.abc import Mapping

NAMES = ("ranks", "world_size")
"""Marks that mean the same; the second is Composer's."""
LINES = (
    "ranks(n, strategy=None, dp_replicate=, dp_shard=, tp=): run the test on n warm ranks, or those of a layout such "
    "as 'tp=2,dp_shard=2'; a list of numbers or strategies runs it once for each (shardproof)",
    "world_size(n): the same as ranks(n) (shardproof)",
)
LAYOUT = "ranks_layout"
"""The parameter of tests whose mark has a list."""
STRATEGY = "strategy"
"""A parameter of this name chooses the layout."""
PARITY = "parity"
PARITY_RANKS = 4
"""Ranks of a `parity` test without a mark."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """How a test is to be run."""

    crew: Crew
    layout: Parallelism
    chosen: bool
    """Whether the test says how the ranks are laid out, not only how many there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """The arguments of a mark."""

    sizes: Sequence[int | str]
    strategies: Sequence[str | None]
    degrees: Mapping[str, int]
    listed: bool


WANTED = pytest.StashKey[Wanted | UsageError]()
"""On every item that this plugin runs: what it wants, or why that cannot be."""


def wanted(item: pytest.Item) -> Wanted | UsageError | None:
    """What `item` asks for; None for a test like any other, the error where a mark makes no sense."""
    mark = _closest(item)
    uses_parity = _uses_parity(item)
    if mark is None and not uses_parity:
        return None
    try:
        if mark is None:
            return _of(PARITY_RANKS, _parameters(item).get(STRATEGY), {}, alone=True)
        asked = _asked(mark)
        size, strategy = _parameters(item).get(LAYOUT, (asked.sizes[0], asked.strategies[0]))
        return _of(size, strategy or _parameters(item).get(STRATEGY), asked.degrees, alone=uses_parity)
    except UsageError as error:
        return UsageError(f"{_written(mark)}: {error}" if mark else str(error))


def variants(definition: pytest.Item) -> list[tuple[int | str, str | None]]:
    """What a test with a list in its mark is parametrised over; empty where there is no list."""
    mark = _closest(definition)
    if mark is None:
        return []
    try:
        asked = _asked(mark)
    except UsageError:
        return []  # shown by the test itself, when it is run
    if not asked.listed:
        return []
    return [(size, strategy) for size in asked.sizes for strategy in asked.strategies]


def _closest(item: pytest.Item) -> pytest.Mark | None:
    return next((mark for mark in item.iter_markers() if mark.name in NAMES), None)


def _uses_parity(item: pytest.Item) -> bool:
    """Whether the test takes our fixture, and not one of the user's with that name."""
    info = getattr(item, "_fixtureinfo", None)
    if info is None or PARITY not in info.name2fixturedefs:
        return False
    return bool(info.name2fixturedefs[PARITY][-1].func.__module__ == f"{__package__}.fixtures")


def _parameters(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return callspec.params if callspec is not None else {}


def _asked(mark: pytest.Mark) -> _Asked:
    extra = set(mark.kwargs) - {STRATEGY, *AXES}
    if len(mark.args) not in {1, 2} or extra or (len(mark.args) == 2 and STRATEGY in mark.kwargs):
        raise UsageError("give ranks(4), ranks(4, 'fsdp'), ranks(4, tp=2) or ranks('tp=2,dp_shard=2')")
    sizes = mark.args[0]
    strategies = mark.args[1] if len(mark.args) == 2 else mark.kwargs.get(STRATEGY)
    asked = _Asked(
        sizes=tuple(sizes) if isinstance(sizes, list | tuple | range) else (sizes,),
        strategies=tuple(strategies) if isinstance(strategies, list | tuple) else (strategies,),
        degrees={axis: mark.kwargs[axis] for axis in AXES if axis in mark.kwargs},
        listed=any(isinstance(one, list | tuple | range) for one in (sizes, strategies)),
    )
    if not asked.sizes or not asked.strategies:
        raise UsageError("an empty list of ranks or strategies: name at least one")
    return asked


def _of(size: object, strategy: object, degrees: Mapping[str, int], *, alone: bool) -> Wanted:
    if isinstance(size, str):
        if strategy is not None or degrees or "=" not in size:
            raise UsageError(f"{size!r} is to be a number, or degrees such as 'tp=2,dp_shard=2' and nothing else")
        layout, chosen = parse(size, None), True
    elif isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UsageError(f"{size!r} is no number of ranks: give a whole number of at least 1")
    elif strategy is not None:
        if degrees:
            raise UsageError(f"strategy={strategy!r} and degrees: give one of them")
        if not isinstance(strategy, str | Parallelism):
            raise UsageError(f"strategy={strategy!r}: give a name such as 'fsdp', degrees or a Parallelism")
        layout, chosen = parse(strategy, size), True
    else:
        layout, chosen = _filled(size, degrees), bool(degrees)
    return Wanted(crew=Crew(size=1 if alone else layout.world_size, alone=alone), layout=layout, chosen=chosen)


def _filled(size: int, degrees: Mapping[str, int]) -> Parallelism:
    """`size` ranks with these degrees. What is left goes to dp_shard, or else dp_replicate, or else tp."""
    rest, left_over = divmod(size, _laid_out(degrees).world_size)
    free = next((axis for axis in ("dp_shard", "dp_replicate", "tp") if axis not in degrees), None)
    if left_over or (free is None and rest != 1):
        raise StrategyError(f"{size} ranks cannot be laid out as {', '.join(f'{a} {n}' for a, n in degrees.items())}")
    return _laid_out(dict(degrees) | ({free: rest} if free else {}))


def _laid_out(degrees: Mapping[str, int]) -> Parallelism:
    replicate, shard, tp = (degrees.get(axis, 1) for axis in AXES)
    return Parallelism(dp_replicate=replicate, dp_shard=shard, tp=tp)


def _written(mark: pytest.Mark) -> str:
    def arguments() -> Iterator[str]:
        yield from map(repr, mark.args)
        yield from (f"{name}={value!r}" for name, value in mark.kwargs.items())

    return f"@pytest.mark.{mark.name}({', '.join(arguments())})"
