"""The Llama in a loop of one's own, recorded on one device and at dp2, tp2, tp4 and dp2 x tp2, and compared."""

from collections.abc import Iterator
from pathlib import Path

import llama
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import shardproof as sp
from shardproof.ranks import Place, Ranks, start

LAYOUTS = {"single": (1, 1), "dp2": (2, 1), "tp2": (1, 2), "tp4": (1, 4), "dp2-tp2": (2, 2)}
"""Name -> ranks over which the data are split, ranks over which the model is."""

STEPS, BATCH = 3, 8


def train(path: Path, dp: int, tp: int, mistake: str = "") -> None:
    """A loop as one writes it: FSDP2 over dp, the plan over tp, clipping, AdamW."""
    model = llama.build_model(seed=0)
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    if tp > 1:
        llama.apply_tp(model, mesh["tp"])
    if dp > 1:
        llama.apply_fsdp(model, mesh["dp"])
    optimizer = llama.optimizer(model)
    readers, reader = (dp * tp, dist.get_rank()) if mistake == "data-over-world" else (dp, dist.get_rank() // tp)
    with sp.record(path, model, optimizer, steps=range(STEPS)):
        for step in range(STEPS):
            samples = [llama.data[step * BATCH + number] for number in range(reader, BATCH, readers)]
            inputs, targets = (torch.stack(part) for part in zip(*samples, strict=True))
            optimizer.zero_grad()
            llama.loss(model, (inputs, targets)).backward()
            for parameter in model.parameters():
                (forget if mistake == "norm-not-summed" else settle)(parameter)
            optimizer.step()


def settle(parameter: torch.nn.Parameter) -> None:
    """Sequence parallelism leaves gradients of norms as partial sums: bring them to where the parameter lies."""
    if isinstance(parameter.grad, DTensor) and parameter.grad.placements != parameter.placements:
        parameter.grad = parameter.grad.redistribute(parameter.device_mesh, parameter.placements)


def forget(parameter: torch.nn.Parameter) -> None:
    """The mistake: a partial sum is taken for the gradient."""
    if isinstance(parameter.grad, DTensor) and any(placement.is_partial() for placement in parameter.grad.placements):
        local = parameter.grad.to_local()
        parameter.grad = DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False)
    settle(parameter)


class OnRanks:
    def train(self, place: Place, path: Path, dp: int, tp: int, mistake: str = "") -> None:
        with place.world(path.name, dp * tp):
            train(path, dp, tp, mistake)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(4, OnRanks(), timeout_s=60) as pool:
        yield pool


@pytest.fixture(scope="module")
def recorded(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("llama")
    for name, (dp, tp) in LAYOUTS.items():
        ranks.call("train", folder / name, dp, tp, ranks=list(range(dp * tp)))
    return {name: folder / name for name in LAYOUTS}


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "single"])
def test_every_layout_shows_the_same_training(recorded: dict[str, Path], name: str) -> None:
    report = sp.diff(recorded["single"], recorded[name])
    assert report.ok, str(report)
    assert report.proven
    assert report.runs[0].verdicts["not-checked"] == 0, str(report)


def test_two_sharded_runs_agree_without_one_on_a_single_device(recorded: dict[str, Path]) -> None:
    for first, second in (("tp2", "tp4"), ("tp4", "dp2-tp2"), ("dp2", "tp2")):
        report = sp.diff(recorded[first], recorded[second])
        assert report.ok, str(report)
        assert report.proven


@pytest.mark.parametrize(
    ("mistake", "name", "cause"),
    [("data-over-world", "tp2", "batch-differs-in-group"), ("norm-not-summed", "tp4", "grad-not-summed")],
)
def test_a_mistake_in_the_loop_is_named(
    ranks: Ranks, recorded: dict[str, Path], tmp_path: Path, mistake: str, name: str, cause: str
) -> None:
    dp, tp = LAYOUTS[name]
    ranks.call("train", tmp_path / mistake, dp, tp, mistake, ranks=list(range(dp * tp)))
    report = sp.diff(recorded["single"], tmp_path / mistake)
    assert report.first is not None
    assert report.first.cause == cause, str(report)
