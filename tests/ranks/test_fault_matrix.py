"""Whatever breaks, and however it was started: one message with rank, cause and line, in time, and nothing is left.

The table of docs/when-ranks-break.md is printed by `python tests/ranks/fault_table.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_matrix import FAULTS, FAULTY, Fault, run
from warm_commands import Commands


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    commands = Commands()
    yield commands
    commands.close()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.way}-{fault.name}".replace(" ", "-"))
def test_a_fault_is_told_once_in_time_and_leaves_nothing(fault: Fault, commands: Commands, tmp_path: Path) -> None:
    if fault.rare and not os.environ.get("SHARDPROOF_FULL"):
        pytest.skip("takes long or is rare: SHARDPROOF_FULL=1 runs it")
    seen = run(fault, commands, tmp_path)
    assert seen.exit_code == fault.exit_code, seen.said
    for text in fault.says:
        assert text in seen.said
    if fault.line:
        assert f"{FAULTY}:{fault.lineno}" in seen.said
    for text in ("Exception ignored", "[rank", "gloo", *fault.never):
        assert text not in seen.said
    assert sum(line.startswith("error: ") for line in seen.said.splitlines()) == (fault.exit_code in {2, 3})
    assert len(seen.said) < 100_000
    assert seen.left == []
    assert seen.kept >= fault.keeps


def test_every_fault_of_the_experiment_is_in_the_table() -> None:
    import faulty

    names = {function.__name__.replace("_", " ") for function in (*faulty.ON_ONE, *faulty.ON_ALL)}
    assert names <= {fault.name for fault in FAULTS}
