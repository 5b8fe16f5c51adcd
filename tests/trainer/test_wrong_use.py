"""Wrong use of the trainer ends in one sentence: the place, the values, the way out."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

import shardproof as sp
from shardproof.checkpoint.save import save
from shardproof.errors import CheckpointError, StrategyError, UsageError
from shardproof.ranks import Place, Ranks, start
from shardproof.spec.strategies import parse
from shardproof.trainer.loop import Loop
from shardproof.trainer.saving import state_of

EXPERIMENT = sp.Experiment(
    model=lambda: nn.Linear(64, 64),
    data=[torch.full((64,), float(number)) for number in range(8)],
    loss=lambda model, batch: model(batch).square().mean(),
    optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    batch_size=2,
)


@pytest.mark.parametrize("value", ["2epochs", "ep", "-1ba", "", 3, None])
def test_what_is_no_duration_is_answered_with_what_is_one(value: Any) -> None:
    with pytest.raises(UsageError, match=f"^max_duration={re.escape(repr(value))} is no duration; .*2ep .*500ba .*1h"):
        sp.Trainer(EXPERIMENT, max_duration=value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("0ep", "max_duration='0ep': a duration is longer than nothing"),
        ("1.5ba", "max_duration='1.5ba': give a whole number of ba"),
        (f"{'9' * 400}ba", "has an end"),
    ],
)
def test_a_duration_that_no_run_has_is_refused(value: str, text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text)):
        sp.Trainer(EXPERIMENT, max_duration=value)


@pytest.mark.parametrize(("count", "unit"), [(0, "ba"), (1.5, "ep"), (float("inf"), "s"), (1, "steps")])
def test_a_duration_cannot_be_made_wrong(count: float, unit: Any) -> None:
    with pytest.raises(UsageError, match=r"^Duration: "):
        sp.Duration(count, unit)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a precision that does not exist": ({"precision": "bf-16"}, "precision='bf-16'; did you mean bf16"),
    "no precision": ({"precision": None}, "precision=None; all: fp64, fp32, bf16, fp16"),
    "an option misspelt": ({"max_durations": "1ep"}, "Trainer takes no 'max_durations'; did you mean max_duration?"),
    "metrics of nothing": ({"metrics": dict}, "metrics are measured on eval_data, and there is none"),
    "a scheduler by name": ({"scheduler": "cosine"}, "scheduler='cosine' cannot be called; pass a function of the"),
    "resuming from nowhere": ({"load_path": "auto"}, "takes the newest checkpoint of save_folder; give save_folder"),
    "a folder that is no path": ({"save_folder": 3}, "save_folder=3; it must be a path"),
    "a callback that is none": ({"callbacks": [3]}, "callbacks holds 3, which is no sp.Callback"),
    "a class for a callback": ({"callbacks": [sp.EarlyStopping]}, "EarlyStopping'>, which is no sp.Callback"),
    "a logger by name": ({"loggers": "wandb"}, "loggers holds 'wandb', which is no sp.Logger"),
    "nothing to keep": ({"keep": 0}, "keep=0; it must be a whole number of at least 1"),
    "a training that is a dict": ({"training": {"keep": 1}}, "training is a dict; make it an sp.Training(...)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_option_is_refused_before_anything_starts(what: str) -> None:
    options, text = WRONG[what]
    with pytest.raises(UsageError, match=re.escape(text)):
        sp.Trainer(EXPERIMENT, **options)


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        ("fsdpp", "there is no strategy 'fsdpp'; did you mean fsdp"),
        ("pp=2", "there is no axis 'pp'; the axes are dp_replicate, dp_shard, tp"),
        (None, "None is none of them; give 'fsdp' or 'tp=2,dp_shard=2'"),
        ("tp", "tp: tensor parallelism needs Experiment.tp_plan"),
    ],
)
def test_a_strategy_that_does_not_exist_is_refused(strategy: Any, text: str) -> None:
    with pytest.raises(StrategyError, match=re.escape(text)):
        sp.Trainer(EXPERIMENT, strategy)


class OnRanks:
    def saves(self, place: Place, folder: Path, steps: int = 3, **changes: Any) -> Any:
        """Train with a checkpoint after each step."""
        return self.said(
            place, {"save_folder": folder, "save_interval": "1ba", "max_duration": f"{steps}ba", **changes}
        )

    def resumes(self, place: Place, folder: Path) -> Any:
        return self.saves(place, folder, 5, load_path="auto")

    def anew(self, place: Place, folder: Path) -> list[object]:
        """What is said while a run starts anew in the folder of another one."""
        heard: list[object] = []
        with place.world("anew", 2):
            about = sp.Training(max_duration="1ba", save_folder=folder, progress_bar=False)
            Loop(EXPERIMENT, parse("fsdp", 2), about, place, heard.append).fit()
        return [str(event) for event in heard]

    def said(self, place: Place, training: dict[str, Any], experiment: dict[str, Any] | None = None) -> str | Any:
        """What the error says, or how far the run has come."""
        with place.world("said", 2):
            about = sp.Training(**{"max_duration": "3ba", "progress_bar": False, **training})
            try:
                fit = Loop(replace(EXPERIMENT, **experiment or {}), parse("fsdp", 2), about, place).fit()
            except UsageError as error:
                return str(error)
            return fit.first_step, fit.step

    def schedules(self, place: Place, which: str) -> str | Any:
        return self.said(place, {"scheduler": SCHEDULERS[which]})

    def others(self, place: Place, path: Path, which: str) -> str | Any:
        training, experiment = OTHERS[which][:2]
        return self.said(place, {"load_path": path, **training}, experiment)

    def full(self, place: Place, folder: Path, save_async: bool) -> Any:
        """Go on from the newest checkpoint for one step, with a disk that is full for rank 1; then with room again."""
        about = sp.Training(
            max_duration="4ba",
            save_folder=folder,
            save_async=save_async,
            load_path="auto",
            progress_bar=False,
        )
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with place.world("full", 2):
            loop = Loop(EXPERIMENT, parse("fsdp", 2), about, place)
            if place.rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
            try:
                loop.fit()
            except CheckpointError as error:
                said = str(error)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            # The first rank removes what was written, the others do not wait for that.
            dist.barrier()
            left = sorted(path.name for path in folder.iterdir())
            dist.barrier()
            again = loop.fit()
            return said, left, again.first_step, again.step, again.checkpoint

    def strangers(self, place: Place, path: Path) -> None:
        """A checkpoint that no trainer wrote."""
        with place.world("strangers", 2):
            loop = Loop(EXPERIMENT, parse("fsdp", 2), sp.Training(), place)
            save(path, loop.root, loop.parameters, loop.optimizer, {"epoch": 3})


SCHEDULERS: dict[str, Any] = {
    "nothing": lambda optimizer: None,
    "plateau": ReduceLROnPlateau,
    "class": StepLR,
    "other": lambda optimizer: StepLR(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), 1),
}

OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "seed": ({"seed": 7}, {}, "is of a run with seed 0, and this one has 7"),
    "batch size": ({}, {"batch_size": 4}, "is of a run with batch_size 2, and this one has 4"),
    "scheduler": (
        {"scheduler": lambda optimizer: ExponentialLR(optimizer, 0.9)},
        {},
        "is of a run with no scheduler, and this one has ExponentialLR: the learning rate would change under way",
    ),
    "names": (
        {},
        {"model": lambda: nn.Sequential(nn.Linear(64, 64))},
        "2 not in the checkpoint: model/0.weight, model/0.bias; 2 not in the model: model/weight, model/bias",
    ),
    "shapes": (
        {},
        {"model": lambda: nn.Linear(64, 32)},
        "model/bias (64,) against (32,)",
    ),
    "optimizer": (
        {},
        {"optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1)},
        "holds the state of AdamW, and this optimizer is SGD",
    ),
    "order": ({"shuffle": False, "max_duration": "4ba"}, {}, "with shuffle = True, and this one has False"),
    "data": ({"max_duration": "4ba"}, {"data": EXPERIMENT.data[:6]}, "with len(data) = 8, and this one has 6"),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(2, OnRanks()) as started:
        yield started


@pytest.fixture
def good(ranks: Ranks, tmp_path: Path) -> Path:
    """A checkpoint after three steps, inside an epoch."""
    ranks.call("saves", tmp_path / "good")
    return tmp_path / "good" / "step-00000003"


def refused(ranks: Ranks, method: str, *args: Any) -> str:
    """What all ranks say alike."""
    (text,) = set(ranks.call(method, *args).values())
    assert isinstance(text, str), f"a run went on: {text}"
    assert "Traceback" not in text
    assert "Error:" not in text, "a type of Python's is nothing that a user has asked for"
    return text


@pytest.mark.parametrize(
    ("which", "text"),
    [
        ("nothing", "scheduler returned NoneType; it must return a torch.optim.lr_scheduler.LRScheduler"),
        ("plateau", "ReduceLROnPlateau is stepped with a metric"),
        ("class", "scheduler cannot be called with the optimizer alone"),
        ("other", "scheduler returned a StepLR of another optimizer"),
    ],
)
def test_a_scheduler_that_could_not_work_is_refused(ranks: Ranks, which: str, text: str) -> None:
    assert text in refused(ranks, "schedules", which)


@pytest.mark.parametrize("which", OTHERS)
def test_a_checkpoint_of_another_run_is_refused(ranks: Ranks, good: Path, which: str) -> None:
    assert OTHERS[which][2] in refused(ranks, "others", good, which)
    # A folder of checkpoints means its newest one, and says so.
    assert str(good) in refused(ranks, "others", good.parent, which) or which in ("order", "data")


def test_a_checkpoint_that_no_run_wrote_says_how_to_take_its_weights(ranks: Ranks, tmp_path: Path) -> None:
    ranks.call("strangers", tmp_path / "theirs")
    text = refused(ranks, "said", {"load_path": tmp_path / "theirs"})
    assert "theirs holds no training run: another program wrote it; load its weights alone (shardproof export" in text


STATES: dict[str, tuple[str, Any]] = {
    "a field that progress lacks": ("progress", {"dict": {"colour": 1}}),
    "progress that is no number": ("progress", {"dict": {"step": "3", "epoch": 0, "samples": 0, "elapsed_s": 0.0}}),
    "progress that is none": ("progress", [1, 2]),
    "a run that says nothing": ("run", {"dict": {}}),
    "callbacks that are no pairs": ("callbacks", [1]),
    "an evaluation of other names": ("evaluation", {"dict": {"colour": 1}}),
}
"""What a checkpoint that was made by hand may hold in place of a run's state."""


@pytest.mark.parametrize("which", STATES)
def test_a_state_that_no_run_writes_is_refused(ranks: Ranks, good: Path, which: str) -> None:
    name, value = STATES[which]
    index = json.loads((good / "index.json").read_text())
    index["extra"]["dict"][name] = value
    (good / "index.json").write_text(json.dumps(index))
    (said,) = set(ranks.call("said", {"load_path": good}).values())
    assert f"{good} is damaged or was made by hand" in said


def test_a_schedulers_state_cannot_take_the_place_of_its_code() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    assert state_of(scheduler, scheduler.state_dict() | {"new": 1})["new"] == 1
    for name in ("step", "optimizer", "__class__"):
        with pytest.raises(ValueError, match=f"holds {name}, which is no state"):
            state_of(scheduler, scheduler.state_dict() | {name: 1})


def test_a_checkpoint_that_is_not_there_or_not_whole_is_refused(ranks: Ranks, good: Path) -> None:
    missing = good.with_name("step-00000009")
    assert refused(ranks, "said", {"load_path": missing}).startswith(f"{missing} does not exist; give")
    weights = good.with_name("w.safetensors")
    assert refused(ranks, "said", {"load_path": weights}).startswith(f"{weights} does not exist; give")
    weights.write_bytes(b"no weights")
    assert "w.safetensors is no whole safetensors file" in refused(ranks, "said", {"load_path": weights})
    file = good / "rank-00001.safetensors"
    os.truncate(file, file.stat().st_size - 4)
    assert "it is damaged or was not copied to the end; copy it again, or load" in refused(
        ranks, "said", {"load_path": good}
    )


@pytest.mark.parametrize("place", ["a file", "inside a file", "/proc/checkpoints"])
def test_a_save_folder_that_cannot_be_one_is_refused_before_the_first_step(
    ranks: Ranks, tmp_path: Path, place: str
) -> None:
    """Not when the first checkpoint is due, which may be hours later."""
    (tmp_path / "file").write_text("")
    folder = {"a file": tmp_path / "file", "inside a file": tmp_path / "file" / "runs"}.get(place, Path(place))
    text = refused(ranks, "saves", folder)
    assert text.startswith(f"{folder} ")
    assert text.endswith("choose another save_folder")


@pytest.mark.parametrize("save_async", [False, True])
def test_a_disk_that_fills_up_costs_no_earlier_checkpoint(ranks: Ranks, good: Path, save_async: bool) -> None:
    told = ranks.call("full", good.parent, save_async)
    assert told[0] == told[1]
    text, left, *again = told[0]
    assert text.startswith("rank 1: ")
    assert "step-00000004 could not be written: [Errno 27] File too large" in text
    assert "free space or choose another folder. Earlier checkpoints are as they were" in text
    assert left == ["step-00000001", "step-00000002", "step-00000003"]
    assert again == [4, 4, good.with_name("step-00000004")], "where there is room again, nothing has to be trained anew"
    assert set(ranks.call("resumes", good.parent).values()) == {(4, 5)}


def test_starting_anew_beside_checkpoints_that_are_further_is_told(ranks: Ranks, good: Path) -> None:
    """A later --resume would go on from those, which may be of other code."""
    first, other = ranks.call("anew", good.parent).values()
    assert first[0].startswith(f"{good} is further than this run, which starts at step 0: to go on from it, use ")
    assert other == []


def test_a_wrong_path_costs_nothing_that_was_trained(tmp_path: Path) -> None:
    with sp.Trainer(EXPERIMENT, "fsdp", ranks=2, max_duration="2ba", progress_bar=False) as trainer:
        assert trainer.fit().step == 2
        with pytest.raises(CheckpointError, match="does not exist"):
            trainer.load(tmp_path / "typo")
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="exists and is no checkpoint"):
            trainer.save(tmp_path / "file")
        for method in ("save", "evaluate", "predict"):
            with pytest.raises(UsageError, match=r"needs a path|nothing to evaluate on"):
                getattr(trainer, method)()
        again = trainer.fit("3ba")
        assert (again.first_step, again.step, len(again.losses)) == (2, 3, 1)
        assert trainer.fit("3ba").losses == ()


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "train.py"
    file.write_text(
        "import torch\nimport shardproof as sp\n"
        "experiment = sp.Experiment(model=lambda: torch.nn.Linear(1, 1), data=[torch.ones(1)] * 4, batch_size=2,\n"
        "    loss=lambda model, batch: model(batch).mean(),\n"
        "    optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))\n"
    )
    command = [sys.executable, "-m", "shardproof", "train", str(file), "--strategy", "fsdp", "--ranks", "2"]
    done = subprocess.run(
        [*command, "--load-path", str(tmp_path / "nowhere")], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"error: {tmp_path / 'nowhere'} does not exist; give the folder of a checkpoint, as runs/step-00000500\n"
    )
