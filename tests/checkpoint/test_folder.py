"""Names of checkpoints, the newest, and how many stay."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from shardproof.checkpoint import folder
from shardproof.checkpoint.load import read_extra
from shardproof.checkpoint.save import save
from shardproof.parallel.held import held_parameters


def save_step(runs: Path, step: int, keep: int | None = None) -> None:
    model = nn.Linear(1, 1)
    save(runs / folder.step_name(step), model, list(held_parameters(model)), None, {"step": step}, keep=keep)


def names(runs: Path) -> list[str]:
    return sorted(path.name for path in runs.iterdir())


def test_the_newest_is_the_highest_step_also_beyond_eight_digits(tmp_path: Path) -> None:
    assert folder.newest(tmp_path / "nothing") is None
    for step in (5, 123_456_789, 40):
        save_step(tmp_path, step)
    assert [path.name for path in folder.checkpoints(tmp_path)] == ["step-00000005", "step-00000040", "step-123456789"]
    assert read_extra(tmp_path) == {"step": 123_456_789}


def test_folders_without_an_index_are_no_checkpoints(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    (tmp_path / "step-00000002").mkdir()
    assert folder.newest(tmp_path) == tmp_path / "step-00000001"


def test_the_last_ones_stay_and_the_one_just_written_always_does(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    # A run that went back to an earlier step.
    save_step(tmp_path, 1, keep=2)
    assert names(tmp_path) == ["step-00000001", "step-00000004"]


def test_what_cannot_be_deleted_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "not yours", str(path))

    save_step(tmp_path, 1)
    monkeypatch.setattr(folder.shutil, "rmtree", refuse)
    with pytest.warns(RuntimeWarning, match="an old checkpoint cannot be deleted"):
        save_step(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert folder.newest(tmp_path) == tmp_path / "step-00000002"
    folder.clean(tmp_path)
    assert names(tmp_path) == ["step-00000002"]


def test_tidying_up_leaves_alone_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".step-00000007.writing-0123abcd").mkdir()
    (tmp_path / "notes.txt").touch()
    folder.clean(tmp_path)
    assert names(tmp_path) == [".git", "notes.txt"]
