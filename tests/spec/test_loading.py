"""What an EXPERIMENT on the command line stands for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardproof.errors import ExperimentError
from shardproof.spec.experiment import Experiment
from shardproof.spec.loading import load

MADE = "Experiment(model=dict, data=[1], loss=max, optimizer=list, batch_size={size})"
HEAD = "from shardproof.spec.experiment import Experiment\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("one_", "shardproof_experiment_")):
            del sys.modules[name]


def write(path: Path, **sizes: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEAD + "".join(f"{name} = {MADE.format(size=size)}\n" for name, size in sizes.items()))
    return path


def test_a_name_behind_a_colon_is_taken(folder: Path) -> None:
    file = write(folder / "one_a.py", experiment=8, other=4)
    assert load(f"{file}:other").batch_size == 4


def test_without_a_name_the_one_called_experiment_or_the_only_one_is_taken(folder: Path) -> None:
    assert load(str(write(folder / "one_b.py", experiment=8, other=4))).batch_size == 8
    assert load(str(write(folder / "one_c.py", whatever=2))).batch_size == 2


def test_of_several_one_has_to_be_named(folder: Path) -> None:
    file = write(folder / "one_d.py", first=8, second=4)
    with pytest.raises(ExperimentError, match=r"2 Experiments; name one, as .*one_d\.py:first"):
        load(str(file))


def test_a_module_is_found_in_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "one_package" / "inner.py", experiment=8, other=4)
    monkeypatch.chdir(folder)
    assert load("one_package.inner:other").batch_size == 4
    assert load("one_package.inner").batch_size == 8


def test_the_folder_of_the_file_is_importable(folder: Path) -> None:
    (folder / "one_beside.py").write_text("size = 16\n")
    file = folder / "one_e.py"
    file.write_text(f"from one_beside import size\n{HEAD}experiment = {MADE.format(size='size')}\n")
    assert load(str(file)).batch_size == 16


def test_a_file_does_not_replace_a_module_of_its_name(folder: Path) -> None:
    import json

    file = write(folder / "json.py", experiment=8)
    assert load(str(file)).batch_size == 8
    assert sys.modules["json"] is json


def test_two_files_of_one_name_are_two_experiments(folder: Path) -> None:
    first, second = write(folder / "x" / "one_f.py", experiment=8), write(folder / "y" / "one_f.py", experiment=4)
    assert [load(str(first)).batch_size, load(str(second)).batch_size] == [8, 4]


def test_a_relative_path_and_a_file_of_the_current_folder_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "sub" / "one_g.py", experiment=8)
    monkeypatch.chdir(folder)
    assert load("sub/one_g.py").batch_size == 8
    assert load("./sub/one_g.py:experiment").batch_size == 8
    monkeypatch.chdir(folder / "sub")
    assert load("one_g.py").batch_size == 8


def test_dataclasses_and_pickle_work_in_the_file(folder: Path) -> None:
    file = folder / "one_h.py"
    file.write_text(
        "from __future__ import annotations\nimport pickle\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Config:\n    size: int = 8\n"
        f"{HEAD}copied = pickle.loads(pickle.dumps(Config()))\nexperiment = {MADE.format(size='copied.size')}\n"
    )
    assert load(str(file)).batch_size == 8


def test_a_file_that_failed_once_can_be_loaded_once_it_is_mended(folder: Path) -> None:
    file = folder / "one_i.py"
    file.write_text("raise ValueError('not yet')\n")
    with pytest.raises(ExperimentError, match=r"one_i\.py:1: ValueError: not yet"):
        load(str(file))
    assert isinstance(load(str(write(file, experiment=8))), Experiment)


def test_an_interruption_is_no_broken_experiment(folder: Path) -> None:
    file = folder / "one_j.py"
    file.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load(str(file))
