"""What an entry of the zoo is: a bug that must be found and named, or right code that must pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shardproof.spec.experiment import Experiment
from shardproof.zoo.setting import Setting

Build = Callable[[Setting], Experiment]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bug:
    """A real bug of parallel training as a small experiment."""

    name: str
    """The catalogue's slug, with `_` for `-`."""

    summary: str
    cause: str
    """One of `diagnose.finding.CAUSES`."""

    layout: str
    """The kind of layout that shows it; see `Setting.layout`."""

    stages: tuple[str, ...]
    """Stages at which a finding may rightly place it."""

    where: tuple[str, ...]
    """Name patterns of the tensors or modules at which a finding may rightly place it."""

    source: str
    """The public thread it was taken from."""

    build: Build
    trusted: Build | None = None
    """Builds the experiment to be trusted, where that is not the entry's own on one device (a step with a scaler)."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `check` beside the strategy, as `dtype`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """Right code that looks like a bug, or that a careless checker takes for one."""

    name: str
    summary: str
    layout: str
    build: Build
    trusted: Build | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def bug(
    *,
    cause: str,
    layout: str,
    stages: str | tuple[str, ...],
    where: str | tuple[str, ...],
    source: str,
    trusted: Build | None = None,
    **options: Any,
) -> Callable[[Build], Bug]:
    """Make a `Bug` out of the function that builds its experiment; its docstring is the summary."""

    def entry(build: Build) -> Bug:
        return Bug(
            name=_name(build),
            summary=_summary(build),
            cause=cause,
            layout=layout,
            stages=(stages,) if isinstance(stages, str) else stages,
            where=(where,) if isinstance(where, str) else where,
            source=source,
            build=build,
            trusted=trusted,
            options=options,
        )

    return entry


def control(*, layout: str, trusted: Build | None = None, **options: Any) -> Callable[[Build], Control]:
    """Make a `Control` out of the function that builds its experiment; its docstring is the summary."""

    def entry(build: Build) -> Control:
        return Control(
            name=_name(build),
            summary=_summary(build),
            layout=layout,
            build=build,
            trusted=trusted,
            options=options,
        )

    return entry


def _name(build: Build) -> str:
    return str(getattr(build, "__name__", build))


def _summary(build: Build) -> str:
    return " ".join((inspect.getdoc(build) or "").split("\n\n")[0].split())
