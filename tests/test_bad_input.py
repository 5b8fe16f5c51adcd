"""Wrong use and broken experiments end with one line that names the place, the values and the way out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.utils.data import TensorDataset

import shardproof as sp

ROOT = Path(__file__).parents[1]

INPUTS = torch.linspace(-1.0, 1.0, 32 * 4).sin().reshape(32, 4)
LABELS = torch.arange(32) % 3


class Mlp(nn.Module):
    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, hidden)
        self.fc2 = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 4) -> (batch, 3)
        return self.fc2(self.fc1(x).tanh())


class Tied(nn.Module):
    """An embedding (3, 4) and a head (3, 4) that are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(3, 4)
        self.head = nn.Linear(4, 3, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:  # (batch, 4) -> (batch, 3)
        return self.head(x + self.emb.weight.sum(0))


class Heads(nn.Module):
    """Two heads of three: columns may only be split between heads."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 4) -> (batch, 3)
        heads = self.up(x).view(len(x), -1, 3)
        return self.down(heads.softmax(-1).flatten(1))


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


GOOD = sp.Experiment(
    model=Mlp,
    data=TensorDataset(INPUTS, LABELS),
    loss=mean_loss,
    optimizer=sgd,
    batch_size=8,
    steps=2,
    tp_plan={"fc1": "colwise", "fc2": "rowwise"},
)


def refused(work: Callable[[], object], *words: str, error: type[Exception] = sp.UsageError) -> str:
    """The message of the error that `work` raises: one line that holds all `words`."""
    with pytest.raises(error) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
    return message


def refused_check(strategy: str, *words: str, ranks: int = 2, error: Any = sp.UsageError, **changes: Any) -> str:
    return refused(lambda: sp.check(replace(GOOD, **changes), (strategy,), ranks), *words, error=error)


# Finding the experiment.

FILES = {
    "good.py": """\
        import shardproof as sp
        experiment = sp.Experiment(model=dict, data=[1], loss=max, optimizer=list, batch_size=8)
        other = 3
        """,
    "two.py": """\
        import shardproof as sp
        first = sp.Experiment(model=dict, data=[1], loss=max, optimizer=list, batch_size=8)
        second = sp.Experiment(model=dict, data=[1], loss=max, optimizer=list, batch_size=4)
        """,
    "empty.py": "answer = 42\n",
    "typo.py": "answer = 42\nif answer\n    pass\n",
    "raising.py": "import os\n\nnumber = 1 / 0\n",
    "leaving.py": "import sys\nsys.exit(5)\n",
    "missing.py": "import no_such_library_at_all\n",
    "badvalue.py": """\
        import shardproof as sp

        experiment = sp.Experiment(model=dict, data=[1], loss=max, optimizer=list, batch_size=0)
        """,
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        lines = text.splitlines(keepends=True)
        (tmp_path / name).write_text("".join(line.removeprefix(" " * 8) for line in lines))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("godd.py", ["godd.py", "no such file", "good.py"]),
        ("nowhere/good.py", ["nowhere/good.py", "no folder nowhere"]),
        ("good.py:experimant", ["good.py:experimant", "'experimant'", "experiment"]),
        ("good.py:other", ["other", "int", "not an Experiment", "experiment"]),
        ("two.py", ["two.py", "2 Experiments", "two.py:first"]),
        ("empty.py", ["empty.py", "holds no Experiment", "experiment = "]),
        ("typo.py", ["typo.py:2", "SyntaxError"]),
        ("raising.py", ["raising.py:3", "ZeroDivisionError"]),
        ("leaving.py", ["leaving.py:2", "SystemExit"]),
        ("missing.py", ["missing.py:1", "no_such_library_at_all"]),
        ("badvalue.py", ["badvalue.py:3", "Experiment.batch_size is 0"]),
        ("no_such_module_here", ["no_such_module_here", "no such module or file", "path/to/file.py[:name]"]),
        ("no_such_package_here.inner:name", ["no_such_package_here.inner", "no such module or file"]),
        ("json:dumps", ["json:dumps", "not an Experiment"]),
        ("", ["path/to/file.py[:name]"]),
    ],
)
def test_a_target_that_cannot_be_loaded_says_where_and_what_is_there(
    files: Path, target: str, words: list[str]
) -> None:
    refused(lambda: sp.load(target), *words, error=sp.ExperimentError)


def shardproof(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "shardproof", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["godd.py"], ["godd.py", "no such file"]),
        (["typo.py"], ["typo.py:2", "SyntaxError"]),
        (["good.py", "--strategies", "tp_fdsp"], ["'tp_fdsp'", "did you mean tp_fsdp"]),
        (["good.py", "--strategy", "tp=two"], ["tp=two", "whole number of at least 1"]),
    ],
)
def test_the_command_line_ends_with_one_line_and_exit_code_2(
    files: Path, arguments: list[str], words: list[str]
) -> None:
    done = shardproof("check", *arguments, cwd=files)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert [word for word in words if word not in done.stderr] == []


def test_a_tp_that_cuts_through_the_heads_of_the_example_is_named_with_the_line_that_cannot_run() -> None:
    done = shardproof("check", "examples/gpt.py", "--strategy", "tp=3")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()[-1:]
    assert line.startswith("error: tp=3: ")
    assert "examples/gpt.py:" in line
    assert "divides its heads" in line


# Strategies, ranks and options.


@pytest.mark.parametrize(
    ("strategies", "ranks", "words"),
    [
        (("fspd",), 4, ["'fspd'", "did you mean fsdp", "tp_hsdp"]),
        (("hsdp",), 3, ["hsdp", "dp_replicate 2 x dp_shard n", "3 ranks", "4, 6, 8"]),
        (("tp_hsdp",), 4, ["tp 2 x dp_replicate 2 x dp_shard n", "4 ranks", "8, 12, 16"]),
        (("ddp",), 1, ["ddp", "1 ranks", "2, 3, 4"]),
        (("tp=2,tp=2",), 4, ["tp=2,tp=2", "twice"]),
        (("tp=0",), 4, ["tp is '0'", "at least 1"]),
        (("tp=-2",), 4, ["tp is '-2'", "at least 1"]),
        (("tp=2,pp=2",), 4, ["'pp'", "dp_replicate, dp_shard, tp"]),
        ("ddp", 2, ["'ddp'", "one text", "('ddp',)"]),
        ((), 2, ["no strategy", "name at least one"]),
        (("ddp",), 0, ["ranks=0", "at least 1"]),
        (("ddp",), -4, ["ranks=-4", "at least 1"]),
        (("ddp",), 2.0, ["ranks=2.0", "whole number"]),
        (("ddp",), True, ["ranks=True", "whole number"]),
    ],
)
def test_a_strategy_that_does_not_fit_says_the_arithmetic(strategies: Any, ranks: Any, words: list[str]) -> None:
    refused(lambda: sp.check(GOOD, strategies, ranks), *words, error=sp.StrategyError)


def test_degrees_below_one_are_refused_where_they_are_made() -> None:
    refused(lambda: sp.Parallelism(tp=0), "tp=0", "at least 1", error=sp.StrategyError)
    refused(lambda: sp.Parallelism(dp_shard=True), "dp_shard=True", "whole number", error=sp.StrategyError)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float8"}, ["'float8'", "float64, float32, bfloat16"]),
        ({"dtype": torch.int64}, ["'int64'", "float64, float32, bfloat16"]),
        ({"show": (4,)}, ["show 4", "ranks 0 to 3"]),
        ({"show": (-1,)}, ["show -1", "ranks 0 to 3"]),
        ({"steps": 0}, ["steps=0", "at least 1"]),
        ({"steps": 1.5}, ["steps=1.5", "whole number"]),
        ({"device": "tpu"}, ["'tpu'", "'cpu' or 'cuda'"]),
        ({"timeout_s": 0.0}, ["timeout=0", "above 0"]),
        ({"reference": "fspd"}, ["'fspd'", "single"]),
    ],
)
def test_an_option_that_cannot_be_meant_names_what_it_takes(options: dict[str, Any], words: list[str]) -> None:
    refused(lambda: sp.check(GOOD, ("ddp",), 4, **options), *words)


def test_a_batch_that_does_not_divide_names_all_three_numbers_and_the_next_sizes() -> None:
    words = ("batch_size 8", "3 data ranks x 2 micro-batches", "= 6", "6 or 12")
    refused_check("ddp", *words, ranks=3, error=sp.StrategyError, microbatches=2)


# Tensor parallelism that cannot be.


def test_heads_that_do_not_divide_are_refused_with_the_line_of_the_model() -> None:
    message = refused_check(
        "tp=4",
        "tp=4",
        f"{__file__}:",
        "divides its heads",
        error=sp.StrategyError,
        model=Heads,
        tp_plan={"up": "colwise", "down": "rowwise"},
    )
    assert f":{Heads.forward.__code__.co_firstlineno + 1}:" in message


UNEVEN_PLANS = [
    {"fc1": "colwise_gather", "fc2": "rowwise_split_input"},
    {"fc1": ColwiseParallel(use_local_output=False), "fc2": "rowwise"},
]


@pytest.mark.parametrize("plan", UNEVEN_PLANS, ids=["gathered", "kept"])
@pytest.mark.parametrize("tp", [2, 3, 4])
def test_uneven_and_even_empty_shards_run_where_torch_runs_them(tp: int, plan: dict[str, Any]) -> None:
    # 5 columns over 2, 3 and 4 ranks: 3+2, 2+2+1 and 2+2+1+0.
    report = sp.check(replace(GOOD, model=lambda: Mlp(5), tp_plan=plan, max_grad_norm=0.1), (f"tp={tp}",))
    assert report.ok, str(report)


def test_uneven_columns_that_torch_cannot_put_together_are_refused_with_the_tp() -> None:
    # Handed on as plain tensors, 3 and 2 columns of 5 are taken for 6: torch 2.13's rowwise assumes equal ones.
    refused_check("tp", "tp=2", "divides", error=sp.StrategyError, model=lambda: Mlp(5))


def test_a_plan_pattern_that_matches_nothing_lists_near_names() -> None:
    refused_check("tp", "tp_plan", "'fc3'", "fc1", "fc2", error=sp.PatternError, tp_plan={"fc3": "colwise"})


def test_a_unit_pattern_that_matches_nothing_lists_near_names() -> None:
    refused_check("fsdp", "fsdp_units", "'block.*'", "fc1", error=sp.PatternError, fsdp_units=("block.*",))


def test_a_placement_pattern_that_matches_nothing_lists_near_names() -> None:
    """`placements` is one of the three fields that `PatternError` speaks of."""
    refused_check("ddp", "placements", "'fc3.weight'", error=sp.PatternError, placements={"fc3.weight": {"tp": 0}})


def test_a_style_that_does_not_exist_lists_those_that_do() -> None:
    refused_check("tp", "'fc1'", "'colwize'", "did you mean colwise", "rowwise", tp_plan={"fc1": "colwize"})


def test_a_style_that_is_no_style_is_shown() -> None:
    refused_check("tp", "'fc1'", "3", "ParallelStyle", tp_plan={"fc1": 3})


def test_a_style_that_torch_cannot_apply_names_the_module_and_its_type() -> None:
    model = lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))  # noqa: E731
    refused_check("tp", "'0'", "LayerNorm", "tp=2", error=sp.StrategyError, model=model, tp_plan={"0": "colwise"})


def test_tied_parameters_laid_out_differently_are_named() -> None:
    plan = {"emb": "colwise", "head": "colwise_gather"}
    refused_check("tp", "emb.weight", "head.weight", "tied", error=sp.StrategyError, model=Tied, tp_plan=plan)


def test_tensor_parallelism_without_a_plan_says_how_one_looks() -> None:
    refused_check("tp", "tp_plan", "colwise", "parallelize", error=sp.StrategyError, tp_plan={})


# Models, losses, data and optimizers that cannot be trained.


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.ReLU, ["ReLU", "no parameters"]),
        (lambda: Mlp().requires_grad_(False), ["none of the model's 4 parameters", "requires a gradient"]),
        (dict, ["Experiment.model returned dict", "nn.Module"]),
        (lambda: None, ["Experiment.model returned NoneType", "nn.Module"]),
        (lambda: Mlp, ["Experiment.model returned type", "nn.Module"]),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(model: Any, words: list[str]) -> None:
    refused_check("ddp", *words, error=sp.ExperimentError, model=model)


def unreduced(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def not_a_number(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return mean_loss(model, batch) * float("nan")


def infinite(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return mean_loss(model, batch) * float("inf")


def independent(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return mean_loss(model, batch).detach()


def nothing_counts(model: nn.Module, batch: tuple[Tensor, Tensor]) -> sp.LossSum:
    return sp.LossSum(total=mean_loss(model, batch), count=0)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (unreduced, ["Experiment.loss", "(8,)", "scalar", ".mean()"]),
        (lambda model, batch: mean_loss(model, batch).reshape(1), ["Experiment.loss", "(1,)", "scalar"]),
        (lambda model, batch: 1.5, ["Experiment.loss returned float", "LossSum"]),
        (lambda model, batch: None, ["Experiment.loss returned NoneType", "LossSum"]),
        (lambda model, batch: (mean_loss(model, batch), {}), ["Experiment.loss returned tuple", "LossSum"]),
        (not_a_number, ["loss is nan", "step 0", "one device"]),
        (infinite, ["loss is inf", "step 0", "one device"]),
        (independent, ["Experiment.loss does not depend", "detach()"]),
        (nothing_counts, ["step 0", "add up to 0", "LossSum"]),
    ],
)
def test_a_loss_that_cannot_be_trained_on_is_refused(loss: Any, words: list[str]) -> None:
    refused_check("ddp", *words, error=sp.ExperimentError, loss=loss)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (TensorDataset(INPUTS[:7], LABELS[:7]), ["7 samples", "batch of 8", "batch_size"]),
        (TensorDataset(INPUTS[:0], LABELS[:0]), ["0 samples", "batch of 8"]),
        (iter([1, 2]), ["Experiment.data", "list_iterator", "len()", "map-style"]),
        (lambda: (i for i in range(9)), ["Experiment.data", "generator", "len()"]),
        (None, ["Experiment.data", "NoneType", "len()"]),
        (7, ["Experiment.data", "int", "len()"]),
    ],
)
def test_data_that_cannot_be_cut_into_batches_is_refused(data: Any, words: list[str]) -> None:
    refused_check("ddp", *words, error=sp.ExperimentError, data=data)


def test_a_dataset_class_that_was_not_called_is_taken_for_a_function_that_builds_one() -> None:
    class Data:
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return INPUTS[index], LABELS[index]

    assert sp.check(replace(GOOD, data=Data), ("ddp",), 2).ok


def test_an_optimizer_over_other_parameters_is_refused() -> None:
    def over_another_model(model: nn.Module) -> torch.optim.Optimizer:
        return sgd(Mlp())

    words = ("Experiment.optimizer", "not the model's")
    refused_check("ddp", *words, error=sp.ExperimentError, optimizer=over_another_model)


@pytest.mark.parametrize("made", [None, 0.1, [sgd]])
def test_something_that_is_no_optimizer_is_refused(made: Any) -> None:
    words = ("Experiment.optimizer returned", type(made).__name__, "torch.optim.Optimizer")
    refused_check("ddp", *words, error=sp.ExperimentError, optimizer=lambda model: made)


# The user's own layout, loader and step.


def test_batches_that_end_early_name_rank_count_and_need() -> None:
    def only_one(data: Any, mesh: Any, parallelism: sp.Parallelism) -> Any:
        yield INPUTS[:4], LABELS[:4]

    words = ("Experiment.batches ended after 1", "ddp", "2 steps x 1", "need 2")
    refused_check("ddp", *words, error=sp.ExperimentError, batches=only_one)


@pytest.mark.parametrize("made", [None, 3])
def test_batches_that_are_no_iterable_are_refused(made: Any) -> None:
    words = ("Experiment.batches", type(made).__name__)
    refused_check("ddp", *words, error=sp.ExperimentError, batches=lambda data, mesh, parallelism: made)


def test_a_layout_that_returns_nothing_is_refused() -> None:
    words = ("Experiment.parallelize returned None", "nn.Module")
    refused_check("ddp", *words, error=sp.ExperimentError, parallelize=lambda model, mesh, parallelism: None)


@pytest.mark.parametrize("returned", [None, "0.5", torch.ones(2)], ids=["none", "text", "two"])
def test_a_step_that_returns_no_scalar_is_refused(returned: Any) -> None:
    def step(step: sp.Step) -> Any:
        step.optimizer.zero_grad()
        step.loss(step.model, step.microbatches[0]).backward()
        step.optimizer.step()
        return returned

    refused_check("ddp", "Experiment.train_step returned", "scalar", error=sp.ExperimentError, train_step=step)


# Fields of the experiment.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": None}, ["Experiment.model is None", "function"]),
        ({"loss": 1.0}, ["Experiment.loss is 1.0", "function"]),
        ({"optimizer": "sgd"}, ["Experiment.optimizer is 'sgd'", "function"]),
        ({"parallelize": 1}, ["Experiment.parallelize is 1", "function or None"]),
        ({"batches": [1]}, ["Experiment.batches is [1]", "function or None"]),
        ({"train_step": "mine"}, ["Experiment.train_step is 'mine'", "function or None"]),
        ({"batch_size": 0}, ["Experiment.batch_size is 0", "at least 1"]),
        ({"batch_size": "8"}, ["Experiment.batch_size is '8'", "whole number"]),
        ({"batch_size": 8.0}, ["Experiment.batch_size is 8.0", "whole number"]),
        ({"microbatches": True}, ["Experiment.microbatches is True", "whole number"]),
        ({"steps": -1}, ["Experiment.steps is -1", "at least 1"]),
        ({"seed": -1}, ["Experiment.seed is -1", "at least 0"]),
        ({"seed": None}, ["Experiment.seed is None", "whole number"]),
        ({"max_grad_norm": 0.0}, ["Experiment.max_grad_norm is 0.0", "above 0"]),
        ({"max_grad_norm": float("nan")}, ["Experiment.max_grad_norm is nan", "above 0"]),
        ({"max_grad_norm": "1"}, ["Experiment.max_grad_norm is '1'", "above 0"]),
        ({"fsdp_units": "fc1"}, ["fsdp_units", "'fc1'", "tuple"]),
        ({"fsdp_units": (1,)}, ["fsdp_units", "1"]),
        ({"tp_plan": ["fc1"]}, ["tp_plan", "['fc1']"]),
        ({"placements": ["fc1"]}, ["placements", "['fc1']"]),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused_where_the_experiment_is_made(
    changes: dict[str, Any], words: list[str]
) -> None:
    refused(lambda: replace(GOOD, **changes), *words, error=sp.ExperimentError)


def test_a_module_in_place_of_the_function_that_builds_it_is_refused_with_the_way_out() -> None:
    refused_check("ddp", "Experiment.model", "Mlp", "function", error=sp.ExperimentError, model=Mlp(3))


# The user's own code raises.


class Fragile(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        if dist.get_rank() == 1:
            raise KeyError("broken on rank one")
        return super().forward(x)


def fragile_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    value = mean_loss(model, batch)
    if dist.get_rank() == 1:
        return value / [][0]
    return value


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("changes", "line", "type_name"),
    [
        ({"model": Fragile}, Fragile.forward.__code__.co_firstlineno + 2, "KeyError"),
        ({"loss": fragile_loss}, fragile_loss.__code__.co_firstlineno + 3, "IndexError"),
    ],
    ids=["model", "loss"],
)
def test_code_that_raises_on_one_rank_is_named_by_rank_file_and_line(
    strategy: str, changes: dict[str, Any], line: int, type_name: str
) -> None:
    with pytest.raises(sp.RankFailed) as caught:
        sp.check(replace(GOOD, **changes), (strategy,), 2)
    failure = caught.value.failure
    assert (failure.rank, failure.file, failure.line, failure.type_name) == (1, __file__, line, type_name)
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith(f"rank 1 failed in {strategy} at {__file__}:{line}: {type_name}: ")


CRASHING = """\
import torch
import torch.distributed as dist
import shardproof as sp


def loss(model, batch):
    if dist.get_rank() == 1:
        raise RuntimeError("the second rank gives up")
    return model(batch).mean()


experiment = sp.Experiment(
    model=lambda: torch.nn.Linear(2, 2),
    data=torch.ones(16, 2),
    loss=loss,
    optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    batch_size=4,
)
"""


def test_on_the_command_line_code_that_raises_ends_with_exit_code_3(tmp_path: Path) -> None:
    file = tmp_path / "crashing.py"
    file.write_text(CRASHING)
    done = shardproof("check", str(file), "--strategies", "ddp", "--ranks", "2")
    assert done.returncode == 3
    assert f"error: rank 1 failed in ddp at {file}:8: RuntimeError: the second rank gives up" in done.stderr
    assert "parity" not in done.stdout


def names_of(errors: Sequence[type[Exception]]) -> list[str]:
    return [error.__name__ for error in errors]


def test_every_error_is_a_usage_error_with_exit_code_2_or_a_rank_error_with_3() -> None:
    usage = [sp.ExperimentError, sp.PatternError, sp.StrategyError]
    ranks = [sp.RankFailed, sp.RankDied, sp.RankHung, sp.RankMismatch, sp.RankLost]
    assert names_of([e for e in usage if not (issubclass(e, sp.UsageError) and e.exit_code == 2)]) == []
    assert names_of([e for e in ranks if not (issubclass(e, sp.RankError) and e.exit_code == 3)]) == []
    assert issubclass(sp.ParityError, AssertionError)
    assert sp.ParityError.exit_code == 1
