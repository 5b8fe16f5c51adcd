"""The text of a failure: each cause once, with the ranks that it struck."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from _pytest._code.code import ExceptionChainRepr, ReprEntryNative, ReprFileLocation, ReprTraceback

from shardproof.errors import ParityError
from shardproof.ranks.output import label

_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")

Link = tuple[ReprTraceback, ReprFileLocation | None, str | None]


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a test failed on some ranks."""

    ranks: tuple[int, ...]
    longrepr: Any
    """As pytest represents failures."""


def told(item: pytest.Item, text: str, *, ranks: tuple[int, ...]) -> Cause:
    """A cause that no exception of the test's stands for."""
    file, line, _ = item.location
    crash = ReprFileLocation(path=file, lineno=(line or 0) + 1, message=text.splitlines()[0])
    return Cause(ranks, ExceptionChainRepr([(_plain(text), crash, None)]))


def explained(causes: Sequence[Cause], echoes: Sequence[int], size: int) -> ExceptionChainRepr:
    """All `causes` in one representation, equal ones once; `echoes` are ranks that failed as they lost a peer."""
    chain: list[Link] = []
    summary: ReprFileLocation | None = None
    for ranks, longrepr in _grouped(causes):
        links = _links(longrepr)
        if size > 1 and ranks:
            chain.append((_nothing(), None, label(ranks, "")))
        chain.extend(links)
        if summary is None:
            summary = _labelled(links[-1][1], ranks, size)
    if echoes and any(set(cause.ranks) - set(echoes) for cause in causes):
        chain.append((_nothing(), None, f"{label(sorted(set(echoes)), '')} failed after that, as a peer was lost"))
    # pytest takes the line of its summary from the last link.
    return ExceptionChainRepr([*chain, (_nothing(), summary, None)])


def _grouped(causes: Sequence[Cause]) -> list[tuple[tuple[int, ...], Any]]:
    groups: dict[object, tuple[tuple[int, ...], Any]] = {}
    for cause in causes:
        key = _key(cause.longrepr)
        ranks, longrepr = groups.get(key, ((), cause.longrepr))
        groups[key] = (tuple(sorted({*ranks, *cause.ranks})), longrepr)
    return list(groups.values())


def _key(longrepr: Any) -> object:
    """Equal for failures at the same place with the same words."""
    crash = getattr(longrepr, "reprcrash", None)
    if crash is None:
        return _ADDRESS.sub("0x", str(longrepr))
    return crash.path, crash.lineno, _ADDRESS.sub("0x", crash.message)


def _links(longrepr: Any) -> list[Link]:
    if isinstance(longrepr, ExceptionChainRepr):
        return list(longrepr.chain)
    crash = getattr(longrepr, "reprcrash", None)
    if hasattr(longrepr, "reprtraceback"):
        return [(longrepr.reprtraceback, crash, None)]
    return [(_plain(str(longrepr)), None, None)]


def _labelled(crash: ReprFileLocation | None, ranks: Sequence[int], size: int) -> ReprFileLocation | None:
    if crash is None:
        return None
    message = crash.message
    if ParityError.__name__ in message.partition("\n")[0]:
        message = message.rstrip().rpartition("\n")[2].strip()  # a report ends with what it found
    if size > 1 and ranks:
        message = f"{label(ranks, '')} {message}"
    return dataclasses.replace(crash, message=message)


def _plain(text: str) -> ReprTraceback:
    return ReprTraceback([ReprEntryNative([f"{text}\n"])], extraline=None, style="native")


def _nothing() -> ReprTraceback:
    return ReprTraceback([], extraline=None, style="native")
