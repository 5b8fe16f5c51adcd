"""The text of a test that does not end: where each rank stands, and what it waits for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pytest

from shardproof.pytest_plugin.failures import Cause, told
from shardproof.ranks.output import label

_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)')
_RUNNERS = (
    "/_pytest/",
    "/pluggy/",
    "/pytest/__main__.py",
    "/shardproof/pytest_plugin/",
    "/shardproof/ranks/",
    "<frozen ",
)
"""In the names of files between the start of the process and a test."""
_COLLECTIVES = ("/torch/distributed/distributed_c10d.py", "/torch/distributed/_functional_collectives.py")


def stuck(item: pytest.Item, stacks: Mapping[int, str], done: Sequence[int], limit_s: float) -> Cause:
    """No rank has failed, but these have not ended within the limit."""
    lines = [f"no answer within {limit_s:g} s: {'; '.join(_waiting(stacks, done))}", ""]
    lines += ["Raise the limit (ranks_timeout, or pytest-timeout's) if the test is just slow. Where each rank was:", ""]
    return told(item, "\n".join([*lines, *_stacks(stacks)]), ranks=tuple(sorted(stacks)))


def waited(item: pytest.Item, stacks: Mapping[int, str]) -> Cause:
    """Others have failed, and these were still in the test a while after that."""
    lines = [f"had not ended the test when it was given up: {'; '.join(_waiting(stacks, ()))}", *_stacks(stacks)]
    return told(item, "\n".join(lines), ranks=tuple(sorted(stacks)))


def _waiting(stacks: Mapping[int, str], done: Sequence[int]) -> list[str]:
    at: dict[str, list[int]] = {}
    for rank, stack in sorted(stacks.items()):
        at.setdefault(_where(stack), []).append(rank)
    said = [f"{label(ranks, '').strip('[]')} in {where}" for where, ranks in at.items()]
    return [*said, *([f"{label(done, '').strip('[]')} had ended the test"] if done else [])]


def _where(stack: str) -> str:
    """`all_reduce (test_x.py:12)`: the outermost collective, and the line that called it; else the innermost line."""
    frames = [match.groupdict() for line in _own(stack) if (match := _FRAME.match(line))]
    if not frames:
        return "unknown code"
    collective = next((i for i in reversed(range(len(frames))) if frames[i]["file"].endswith(_COLLECTIVES)), None)
    if collective is None:
        return f"{frames[0]['name']} ({_place(frames[0])})"
    callers = (frame for frame in frames[collective + 1 :] if "/torch/" not in frame["file"])
    caller = next(callers, frames[collective])
    return f"{frames[collective]['name']} ({_place(caller)})"


def _place(frame: Mapping[str, str]) -> str:
    return f"{frame['file'].rpartition('/')[2]}:{frame['line']}"


def _stacks(stacks: Mapping[int, str]) -> list[str]:
    alike: dict[str, list[int]] = {}
    for rank, stack in sorted(stacks.items()):
        alike.setdefault("\n".join(_own(stack)), []).append(rank)
    return [line for stack, ranks in alike.items() for line in (f"{label(ranks, '').strip('[]')}:", stack, "")]


def without_runners(lines: Sequence[str]) -> list[str]:
    """`lines` without the frames of pytest and of this plugin, which are in every stack."""
    return [line for line in lines if not (_FRAME.match(line) and any(name in line for name in _RUNNERS))]


def _own(stack: str) -> list[str]:
    """The frames, innermost first, up to where pytest has called the test or a fixture."""
    frames = stack.splitlines()
    outer = next((i for i, frame in enumerate(frames) if any(name in frame for name in _RUNNERS)), len(frames))
    return frames[:outer] or frames
