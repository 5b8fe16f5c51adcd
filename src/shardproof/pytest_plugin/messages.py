"""What pytest's process, the host and the ranks say to each other: plain data that pickles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """pytest's process to the host, and on to the ranks: run a test."""

    index: int
    """Of the test in the session's list, which all processes have inherited."""
    next_index: int | None
    """Of the test that the same crew runs after it, as far as that is known: fixtures that both use stay."""
    crew: Crew
    limit_s: float | None
    """None waits for ever."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Crew:
    """Which ranks run a test. Tests with equal crews share processes and fixtures."""

    size: int
    alone: bool = False
    """Whether the one rank is to be in no process group, as the test starts ranks of its own (`parity`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reported:
    """A rank to the host: one phase (setup, call, teardown) of the test is over."""

    report: dict[str, Any]
    """pytest's TestReport, made serialisable by pytest itself."""
    failed: bool
    echo: bool
    """Whether it failed only because a peer was lost, so that the cause is elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Warned:
    """A rank to the host: Python warned of something. As in pytest_warning_recorded."""

    category: type[Warning]
    text: str
    filename: str
    lineno: int
    when: str
    nodeid: str
    location: tuple[str, int, str] | None


@dataclass(frozen=True, slots=True)
class Stopped:
    """A rank to the host: the test called pytest.exit."""

    reason: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A rank's answer: the test is over, however it went."""

    kept: bool
    """Whether the process group is kept for the next test, as wider fixtures may hold on to it."""
    fit: bool
    """Whether the process can run another test."""


@dataclass(kw_only=True, slots=True)
class Ran:
    """The host to pytest's process: all that is known of a test."""

    reports: dict[int, list[Reported]] = field(default_factory=dict)
    warned: dict[int, list[Warned]] = field(default_factory=dict)
    deaths: dict[int, str] = field(default_factory=dict)
    """Rank -> how its process ended."""
    stacks: dict[int, str] = field(default_factory=dict)
    """Rank -> where it stood when the host gave up on it."""
    broken: dict[int, str] = field(default_factory=dict)
    """Rank -> what went wrong on it outside the test."""
    lost: dict[int, str] = field(default_factory=dict)
    """Rank -> likewise, where that was only the loss of a peer."""
    late: bool = False
    """Whether the time limit was over, rather than that others had failed."""
    mismatch: str = ""
    """Which ranks called another collective than their peers, where that is why the test failed or stood still ..."""
    mismatched: tuple[int, ...] = ()
    """... and these ranks."""
    output: dict[int, list[str]] = field(default_factory=dict)
    """Rank -> what it printed past pytest's capturing, or before it died."""
    stopped: str | None = None
