"""Whatever breaks, and however it was started: one message with rank, cause and line, in time, and nothing is left.

The table of docs/when-ranks-break.md is printed by `python tests/ranks/fault_table.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_matrix import mounts, run
from fault_rows import FAULTS, LONG_S, Fault
from warm_commands import Commands


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    commands = Commands()
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def whole(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the loop records when nothing breaks."""
    seen = run(Fault(name="none", way="record"), commands, tmp_path_factory.mktemp("whole"))
    assert seen.exit_code == 0, seen.said
    return seen.recording


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_told_once_in_time_and_leaves_nothing(
    fault: Fault, commands: Commands, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if fault.rare and not os.environ.get("SHARDPROOF_FULL"):
        pytest.skip("takes long or is rare: SHARDPROOF_FULL=1 runs it")
    if fault.room and fault.room_of_a_file is None and not mounts():
        pytest.skip("needs a file system of its own, which only root may mount")
    seen = run(fault, commands, tmp_path)
    assert seen.exit_code == fault.exit_code, seen.said
    for text in fault.says:
        assert text in seen.said
    if fault.line:
        assert _place(fault) in seen.said
    errors = sum(line.startswith("error: ") for line in seen.said.splitlines())
    if not fault.noise:
        for text in ("Exception ignored", "[rank", "gloo", *fault.never):
            assert text not in seen.said
        assert errors == (fault.exit_code in {2, 3} and fault.way != "pytest")
    assert len(seen.said) < 100_000
    if fault.early:
        assert seen.seconds < LONG_S / 2
    assert seen.left == []
    if fault.way == "record":
        shown = _shows_what_it_shares(seen.recording, request.getfixturevalue("whole"), fault, commands, tmp_path)
        assert ("rank 1: an exception left the loop in step 2: ValueError: 3 is not 4" in shown) == (
            fault.name == "raises"
        )
    else:
        assert seen.kept >= fault.keeps


def _place(fault: Fault) -> str:
    """As we write it, or as Python's traceback does."""
    return f'"{fault.file}", line {fault.lineno}' if fault.way == "record" else f"{fault.file}:{fault.lineno}"


def _shows_what_it_shares(recording: Path, whole: Path, fault: Fault, commands: Commands, folder: Path) -> str:
    """`shardproof show` and `diff` read what was recorded before the fault."""
    shown, compared = folder / "shown", folder / "compared"
    commands.start("shardproof", "show", str(recording), scratch=folder, said=shown, env={})
    assert commands.wait().exit_code == 0, shown.read_text()
    assert f"steps: before the first, 0-{fault.keeps}" in shown.read_text()
    commands.start("shardproof", "diff", str(whole), str(recording), scratch=folder, said=compared, env={})
    assert commands.wait().exit_code == 0, compared.read_text()
    assert "\nparity" in compared.read_text()
    return shown.read_text()


def test_every_fault_of_the_experiment_is_in_the_table() -> None:
    import faulty

    names = {function.__name__.replace("_", " ") for function in (*faulty.ON_ONE, *faulty.ON_ALL)}
    assert names <= {fault.does or fault.name for fault in FAULTS}
