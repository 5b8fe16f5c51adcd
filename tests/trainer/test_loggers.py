"""Where values go. TensorBoard's files are read back; MLflow and wandb are stood in for by what records their calls."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shardproof.errors import UsageError
from shardproof.trainer.logger import Logger
from shardproof.trainer.loggers.console import ConsoleLogger
from shardproof.trainer.loggers.json_lines import JSONLinesLogger
from shardproof.trainer.loggers.mlflow import MLflowLogger
from shardproof.trainer.loggers.tensorboard import TensorBoardLogger
from shardproof.trainer.loggers.wandb import WandbLogger

ABOUT = {"strategy": "tp_fsdp", "ranks": 4, "mesh": {"tp": 2}, "max_grad_norm": None}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_console_gets_one_line_a_report_with_all_that_is_known(capsys: pytest.CaptureFixture[str]):
    logger = ConsoleLogger(every=2)
    logger.open(ABOUT)
    for step in range(1, 6):
        logger.log({"train/loss": 1 / step}, step)
        if step % 2 == 0:
            logger.log({"lr/group0": 1e-5}, step)
    logger.close()
    assert capsys.readouterr().out.splitlines() == [
        "run  strategy tp_fsdp  ranks 4  mesh {'tp': 2}  max_grad_norm None",
        "step 1  train/loss 1",
        "step 2  train/loss 0.5  lr/group0 1e-05",
        "step 4  train/loss 0.25  lr/group0 1e-05",
        "step 5  train/loss 0.2",
    ]


def test_the_console_reports_by_time_what_was_logged_since_the_line_before(capsys: pytest.CaptureFixture[str]):
    clock = Clock()
    logger = ConsoleLogger("10s", clock=clock)
    for step in range(1, 8):
        clock.now += 4
        logger.log({"train/loss": float(step)}, step)
        if step == 2:
            logger.log({"throughput/samples_per_s": 123456.7}, step)
    assert capsys.readouterr().out.splitlines() == [
        "step 1  train/loss 1",
        "step 4  train/loss 4  throughput/samples_per_s 123457",
    ]


def test_an_evaluation_is_on_the_console_at_once(capsys: pytest.CaptureFixture[str]):
    logger = ConsoleLogger("1h")
    logger.log({"train/loss": 2.0}, 9)
    logger.log({"eval/loss": math.nan, "eval/accuracy": 0.98765}, 9)
    assert capsys.readouterr().out == "step 9  train/loss 2  eval/loss nan  eval/accuracy 0.9877\n"
    logger.close()
    assert capsys.readouterr().out == "", "nothing is printed twice"


@pytest.mark.parametrize("every", ["2ep", "often", 0])
def test_the_console_refuses_what_is_neither_steps_nor_time(every: Any):
    with pytest.raises(UsageError, match="ConsoleLogger: every="):
        ConsoleLogger(every)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_every_line_of_json_is_in_the_file_when_log_returns(tmp_path: Path):
    path = tmp_path / "new" / "run.jsonl"
    logger = JSONLinesLogger(path)
    logger.open(ABOUT)
    logger.log({"train/loss": 0.5}, 40)
    about, values = lines_of(path)
    assert about["run"] == ABOUT
    assert (values["step"], values["values"]) == (40, {"train/loss": 0.5})
    assert values["time"] >= about["time"] > 1.6e9
    logger.close()


def test_numbers_that_json_cannot_hold_are_texts_that_float_reads(tmp_path: Path):
    logger = JSONLinesLogger(tmp_path / "run.jsonl")
    logger.open({"path": tmp_path, "betas": (0.9, math.inf)})
    logger.log({"a": math.nan, "b": math.inf, "c": -math.inf}, 1)
    logger.close()
    about, values = lines_of(tmp_path / "run.jsonl")
    assert about["run"] == {"path": str(tmp_path), "betas": [0.9, "Infinity"]}
    assert values["values"] == {"a": "NaN", "b": "Infinity", "c": "-Infinity"}
    assert [float(value) for value in values["values"].values()][1:] == [math.inf, -math.inf]


def test_a_resumed_run_appends_and_a_line_cut_by_a_crash_spoils_no_other(tmp_path: Path):
    path = tmp_path / "run.jsonl"
    logger = JSONLinesLogger(path)
    for step in (1, 2):
        logger.open({})
        logger.log({"loss": 1.0}, step)
    logger.close()
    path.write_text(path.read_text() + '{"step": 3, "val')
    logger.open({})
    logger.log({"loss": 1.0}, 3)
    logger.close()
    lines = path.read_text().splitlines()
    assert lines.pop(4) == '{"step": 3, "val'
    assert [json.loads(line).get("step") for line in lines] == [None, 1, None, 2, None, 3]


def test_a_folder_is_no_file_for_json(tmp_path: Path):
    with pytest.raises(UsageError, match="is a folder; give a file in it"):
        JSONLinesLogger(tmp_path)


def tensorboard_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_shows_the_values_over_steps(tmp_path: Path):
    logger = TensorBoardLogger(tmp_path)
    logger.open(ABOUT)
    for step in (1, 2):
        logger.log({"train/loss": 1 / step, "eval/accuracy": 0.5}, step)
    logger.close()
    events = tensorboard_of(tmp_path)
    assert events.Tags()["scalars"] == ["train/loss", "eval/accuracy"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]


def test_tensorboard_forgets_the_steps_that_a_resumed_run_takes_again(tmp_path: Path):
    for steps, value in ((range(1, 6), 1.0), (range(4, 7), 2.0)):
        logger = TensorBoardLogger(tmp_path)
        logger.open({})
        for step in steps:
            logger.log({"loss": value}, step)
        logger.close()
    shown = [(event.step, event.value) for event in tensorboard_of(tmp_path).Scalars("loss")]
    assert shown == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


class Recorded:
    """Answers every method call with what was prepared for it, and keeps the call."""

    def __init__(self, **answers: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return self._answers.get(name)

        return call

    def called(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, origin=f"{name}.py")
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def mlflow_client(monkeypatch: pytest.MonkeyPatch, *, found: list[Any], params: dict[str, str]) -> Recorded:
    made = SimpleNamespace(info=SimpleNamespace(run_id="made"), data=SimpleNamespace(params=params))
    client = Recorded(create_experiment="7", create_run=made, get_run=made, search_runs=found)
    entities = SimpleNamespace(Param=lambda key, value: (key, value), Metric=lambda *of: of)
    pretend(monkeypatch, "mlflow", MlflowClient=lambda tracking_uri: client, entities=entities)
    return client


def test_mlflow_gets_a_run_with_params_and_metrics(monkeypatch: pytest.MonkeyPatch):
    client = mlflow_client(monkeypatch, found=[], params={})
    logger = MLflowLogger("digits", "first", resume=True)
    logger.open(ABOUT)
    logger.log({"train/loss": 0.5, "train/lr": 0.1}, 40)
    logger.close()
    assert client.called("create_experiment") == [(("digits",), {})]
    assert client.called("create_run") == [(("7",), {"run_name": "first"})]
    (_, about), (_, values) = client.called("log_batch")
    assert about["params"] == [("strategy", "tp_fsdp"), ("ranks", "4"), ("mesh.tp", "2"), ("max_grad_norm", "None")]
    assert [(name, value, step) for name, value, _, step in values["metrics"]] == [
        ("train/loss", 0.5, 40),
        ("train/lr", 0.1, 40),
    ]
    assert client.called("set_terminated") == [(("made",), {"status": "FINISHED"})]


def test_mlflow_goes_on_with_the_run_of_that_name_and_changes_no_param(monkeypatch: pytest.MonkeyPatch):
    earlier = SimpleNamespace(info=SimpleNamespace(run_id="earlier"))
    client = mlflow_client(monkeypatch, found=[earlier], params={"strategy": "ddp", "ranks": "4", "mesh.tp": "1"})
    logger = MLflowLogger("digits", "it's mine", resume=True)
    logger.open(ABOUT)
    assert logger.run_id == "earlier"
    assert not client.called("create_run")
    (where, query), _ = client.called("search_runs")[0]
    assert (where, query) == (["7"], 'attributes.run_name = "it\'s mine"')
    ((_, about),) = client.called("log_batch")
    assert about["params"] == [("max_grad_norm", "None")]


def test_mlflow_takes_many_values_in_several_requests(monkeypatch: pytest.MonkeyPatch):
    client = mlflow_client(monkeypatch, found=[], params={})
    logger = MLflowLogger()
    logger.open({})
    logger.log({f"lr/group{index}": 0.0 for index in range(250)}, 1)
    assert [len(values["metrics"]) for _, values in client.called("log_batch")] == [100, 100, 50]


def test_mlflow_needs_a_name_to_go_on_with_a_run(monkeypatch: pytest.MonkeyPatch):
    mlflow_client(monkeypatch, found=[], params={})
    with pytest.raises(UsageError, match="looks for a run by its name; give run_name"):
        MLflowLogger(resume=True)
    with pytest.raises(UsageError, match="no name with a double quote"):
        MLflowLogger(run_name='so-called "first"', resume=True)


def test_wandb_goes_on_with_a_run_by_its_id_over_an_axis_of_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    run = Recorded()
    wandb = Recorded(init=run)
    pretend(monkeypatch, "wandb", init=wandb.init)
    logger = WandbLogger("digits", id="first", folder=tmp_path, mode="offline")
    logger.open(ABOUT)
    logger.log({"train/loss": 0.5}, 40)
    logger.log({"train/loss": 0.6}, 30)
    logger.close()
    ((_, options),) = wandb.called("init")
    assert (options["id"], options["resume"], options["config"]) == ("first", "allow", ABOUT)
    assert (options["project"], options["dir"], options["mode"]) == ("digits", str(tmp_path), "offline")
    assert (("*",), {"step_metric": "step"}) in run.called("define_metric")
    assert run.called("log") == [(({"train/loss": 0.5, "step": 40},), {}), (({"train/loss": 0.6, "step": 30},), {})]
    assert len(run.called("finish")) == 1


def test_a_new_wandb_run_is_not_resumed(monkeypatch: pytest.MonkeyPatch):
    wandb = Recorded(init=Recorded())
    pretend(monkeypatch, "wandb", init=wandb.init)
    WandbLogger("digits").open({})
    ((_, options),) = wandb.called("init")
    assert options["resume"] is None


LIBRARIES = {"tensorboard": lambda: TensorBoardLogger("runs"), "mlflow": MLflowLogger, "wandb": WandbLogger}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_missing_library_is_named_with_its_command_when_the_logger_is_made(
    library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    # The folder that the library writes its runs to is not the library.
    (tmp_path / library).mkdir()
    monkeypatch.delitem(sys.modules, library, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(UsageError, match=rf"needs {library}, .*pip install 'shardproof\[{library}\]'"):
        LIBRARIES[library]()


@pytest.mark.parametrize(
    "make", [lambda path: JSONLinesLogger(path / "a"), TensorBoardLogger], ids=["json lines", "tensorboard"]
)
def test_a_logger_that_was_not_opened_says_so_and_can_be_closed(make: Any, tmp_path: Path):
    logger: Logger = make(tmp_path)
    with pytest.raises(UsageError, match=r"is not open; call open\(\)"):
        logger.log({"loss": 1.0}, 1)
    logger.close()


def test_no_optional_library_is_loaded_before_it_is_used():
    modules = [f"loggers.{name}" for name in ("console", "json_lines", "tensorboard", "mlflow", "wandb")]
    modules += [f"callbacks.{name}" for name in ("early_stopping", "learning_rate", "throughput", "memory")]
    modules += ["callbacks.gradient_norm", "metrics", "screen"]
    program = "\n".join(
        [
            "import sys, importlib",
            f"for name in {modules}: importlib.import_module('shardproof.trainer.' + name)",
            "print({'torchmetrics', 'tensorboard', 'mlflow', 'wandb'} & sys.modules.keys())",
        ]
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout == "set()\n"
