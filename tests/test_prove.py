"""`prove`: faults planted in a user's own experiment, which of them the check catches, and why it misses the others."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import shardproof as sp
from shardproof import cli
from shardproof.diagnose.finding import CAUSES
from shardproof.report.data import Planted, Proof
from shardproof.train.faults.table import FAULTS

ROOT = Path(__file__).resolve().parents[1]
SAMPLES, LENGTH, WIDTH, HIDDEN, CLASSES = 24, 4, 6, 8, 5
NAMES = [fault.name for fault in FAULTS]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Tagger(nn.Module):
    """A norm, an MLP and a head over each token; a buffer that nothing changes."""

    def __init__(self, *, zero_bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("scale", torch.tensor([1.0, 2.0]))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)
        if zero_bias:
            nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:  # (batch, LENGTH, WIDTH) -> (batch, LENGTH, CLASSES)
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return self.head(x * self.scale[0])


def tokens(lengths: Tensor) -> TensorDataset:
    """No two samples are alike; tokens behind a sample's length do not count."""
    labels = torch.arange(SAMPLES * LENGTH).reshape(SAMPLES, LENGTH) % CLASSES
    counts = torch.arange(LENGTH) < lengths.unsqueeze(1)
    return TensorDataset(drawn(SAMPLES, LENGTH, WIDTH), torch.where(counts, labels, -100))


def summed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> sp.LossSum:
    inputs, labels = batch
    total = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return sp.LossSum(total=total, count=(labels != -100).sum())


def mean(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())


GOOD = sp.Experiment(
    model=Tagger,
    data=tokens(torch.randint(1, LENGTH + 1, (SAMPLES,), generator=torch.Generator().manual_seed(0))),
    loss=summed,
    optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    batch_size=12,
    microbatches=3,
    steps=2,
    max_grad_norm=0.1,
    tp_plan={"up": "colwise", "down": "rowwise"},
)
EQUAL = tokens(torch.full((SAMPLES,), LENGTH))


def proof(experiment: sp.Experiment, strategy: str, **options: Any) -> Proof:
    report = sp.check(experiment, strategies=(strategy,), prove=True, **options)
    assert report.ok, str(report)
    assert len(report.proofs) == 1
    return report.proofs[0]


def missed(found: Proof) -> dict[str, str]:
    return {planted.fault: planted.reason for planted in found.missed}


def one(found: Proof, fault: str) -> Planted:
    return next(planted for planted in found.planted if planted.fault == fault)


@pytest.mark.parametrize("strategy", ["dp_shard=2,tp=2", "dp_replicate=2,tp=2"])
def test_on_a_good_experiment_every_fault_is_caught_at_its_own_stage_and_place(strategy: str):
    found = proof(GOOD, strategy)
    assert missed(found) == {}
    assert all(planted.cause in CAUSES for planted in found.planted)
    names = {planted.fault for planted in found.planted}
    # Replicas hold no shards of their own, but over tp there are some.
    assert [name for name in NAMES if name in names] == NAMES
    assert found.left_out == {}
    stages = {planted.fault: planted.stage for planted in found.planted}
    for fault in FAULTS:
        # Shardproof's own loader is known to be right, so that what was read instead shows in what is made of it.
        if fault.name != "batch-repeated-across-dp":
            assert stages[fault.name] == fault.stage, fault.name
    for name in ("parameter-not-updated", "grad-scale-subset", "grad-not-summed"):
        planted = one(found, name)
        assert planted.where is not None
        assert planted.where in planted.place


def test_faults_are_the_same_each_time_and_change_nothing_else():
    first, second = (sp.check(GOOD, strategies=("tp=2",), prove=True) for _ in range(2))
    plain = sp.check(GOOD, strategies=("tp=2",))
    assert first.proofs == second.proofs
    assert first.runs[0].comparisons == plain.runs[0].comparisons
    assert plain.proofs == ()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp", "fsdp1", "tp_fsdp1"])
def test_every_kind_of_layout_can_be_proven(strategy: str):
    assert missed(proof(replace(GOOD, microbatches=1), strategy)) == {}


def test_what_does_not_apply_is_told_and_not_counted():
    found = proof(replace(GOOD, data=EQUAL, loss=mean, microbatches=1, max_grad_norm=None), "ddp", ranks=2)
    assert found.left_out == {
        "batch-differs-in-group": "there is one tp rank",
        "shards-swapped": "no parameter has two shards of one shape",
        "forward-not-reduced": "there is one tp rank",
        "bias-counted-k-times": "there is one tp rank",
        "grad-not-summed": "there is one tp rank",
        "microbatch-lost": "a step has one micro-batch",
        "mean-of-means": "the loss is a mean over samples, not an sp.LossSum",
        "clip-by-local-norm": "max_grad_norm is not set",
    }
    assert not {planted.fault for planted in found.planted} & set(found.left_out)


# Experiments that are blind.


def test_equal_counts_hide_a_mean_of_means():
    found = proof(replace(GOOD, data=EQUAL), "ddp", ranks=2)
    assert missed(found) == {"mean-of-means": "all parts of a step count equally many elements"}


def test_a_bias_of_zero_hides_that_it_is_counted_twice():
    blind = replace(GOOD, model=lambda: Tagger(zero_bias=True), steps=1)
    found = proof(blind, "tp=2")
    assert missed(found) == {
        "bias-counted-k-times": "down.bias is zero in every forward pass, of which one step has no other"
    }
    # It moves, and is seen in the second step.
    assert one(proof(replace(blind, steps=2), "tp=2"), "bias-counted-k-times").step == 1


def test_the_same_data_on_all_ranks_hide_what_happens_between_them():
    same = TensorDataset(drawn(1, LENGTH, WIDTH).expand(SAMPLES, -1, -1), torch.zeros(SAMPLES, LENGTH).long())
    found = proof(replace(GOOD, data=same), "dp_shard=2,tp=2")
    assert missed(found) == {
        "batch-differs-in-group": "all samples that are read are alike",
        "batch-repeated-across-dp": "all samples that are read are alike",
        "grad-not-reduced": "all data ranks read the same samples, so that the gradient of one is the mean of all",
        "mean-of-means": "all parts of a step count equally many elements",
    }


def test_a_norm_below_the_limit_hides_wrong_clipping():
    found = missed(proof(replace(GOOD, max_grad_norm=1e6), "ddp", ranks=2))
    assert list(found) == ["clip-by-local-norm"]
    assert found["clip-by-local-norm"].startswith("no gradient norm reaches max_grad_norm 1e+06 (the largest is ")


def test_a_rate_of_zero_hides_a_parameter_that_is_not_updated():
    frozen = replace(GOOD, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.0))
    found = missed(proof(frozen, "ddp", ranks=2))
    assert list(found) == ["parameter-not-updated"]
    assert found["parameter-not-updated"].endswith("by more than round-off")


def test_constant_weights_hide_that_shards_are_swapped():
    def model() -> nn.Module:
        built = Tagger()
        for parameter in built.parameters():
            nn.init.constant_(parameter, 0.3)
        return built

    found = missed(proof(replace(GOOD, model=model), "fsdp", ranks=2))
    assert found["shards-swapped"].endswith("are the same number")


# A user's own code.


def replicas(model: nn.Module, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
    return DistributedDataParallel(model, process_group=mesh["dp"].get_group())


def dealt_out(data: Any, mesh: Any, parallelism: sp.Parallelism) -> Iterator[tuple[Tensor, ...]]:
    rank, ranks = mesh["dp"].get_local_rank(), mesh["dp"].size()
    per_part = 12 // ranks // 3
    mine = [data[index] for index in range(len(data)) if index % ranks == rank]
    for start in range(0, len(mine), per_part):
        yield tuple(torch.stack(leaves) for leaves in zip(*mine[start : start + per_part], strict=True))


def stepped(step: sp.Step) -> float:
    step.optimizer.zero_grad()
    logged = 0.0
    for batch in step.microbatches:
        value = step.loss(step.model, batch) / len(step.microbatches)
        value.backward()
        logged += value.item()
    if step.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(step.model.parameters(), step.max_grad_norm)
    step.optimizer.step()
    return logged


OWN = replace(GOOD, data=EQUAL, loss=mean, parallelize=replicas, batches=dealt_out, train_step=stepped)


def test_faults_are_planted_in_a_users_own_layout_loader_and_step():
    found = proof(OWN, "ddp", ranks=2)
    assert missed(found) == {}
    assert {planted.fault for planted in found.planted} == {
        "batch-repeated-across-dp",
        "weights-disturbed",
        "grad-not-reduced",
        "grad-scale",
        "grad-scale-subset",
        "microbatch-lost",
        "clip-by-local-norm",
        "optimizer-state-lost",
        "parameter-not-updated",
        "buffer-garbled",
    }
    # What a user's own loader reads is under test itself.
    assert one(found, "batch-repeated-across-dp").stage == "batch"


def test_a_fault_that_the_users_step_goes_around_is_told_as_such():
    def around(step: sp.Step) -> float:
        return stepped(replace(step, loss=mean))

    found = proof(replace(OWN, train_step=around), "ddp", ranks=2)
    assert found.left_out["grad-scale"].startswith("could not be planted at all gradients, times ")


def test_a_fault_that_stops_the_run_is_caught_and_the_next_ones_are_planted():
    def careful(step: sp.Step) -> float:
        logged = stepped(step)
        first = next(step.model.parameters()).detach().sum()
        both = [torch.zeros_like(first) for _ in range(dist.get_world_size())]
        dist.all_gather(both, first)
        if not torch.equal(both[0], both[-1]):
            raise RuntimeError("replicas are no longer alike")
        return logged

    found = proof(replace(OWN, train_step=careful, model=Single), "ddp", ranks=2)
    stopped = one(found, "weights-disturbed")
    assert stopped.caught
    assert stopped.stopped
    assert "replicas are no longer alike" in stopped.reason
    assert missed(found) == {}
    assert len(found.planted) > 5


class Single(nn.Module):
    """One parameter, so that a fault has one place to be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(drawn(WIDTH, CLASSES, seed=1))

    def forward(self, x: Tensor) -> Tensor:  # (batch, LENGTH, WIDTH) -> (batch, LENGTH, CLASSES)
        return x @ self.weight


# What a reader sees.


def test_a_run_that_diverges_is_not_proven():
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return mean(model, batch) / dist.get_world_size()

    report = sp.check(replace(GOOD, data=EQUAL, loss=loss), strategies=("ddp",), ranks=2, prove=True)
    assert not report.ok
    assert report.proofs == ()


def test_the_text_says_how_many_were_caught_and_why_others_were_not():
    report = sp.check(replace(GOOD, data=EQUAL), strategies=("ddp",), ranks=2, prove=True)
    lines = str(report).splitlines()
    assert "  - ddp: caught 11 of 12 planted faults" in lines
    told = " ".join(str(report).split())
    assert "missed: mean-of-means (the parts of every step): all parts of a step count equally many elements" in told
    assert lines[-1] == "parity: ddp computes the same training as single"


@pytest.mark.skipif(not (ROOT / "examples").exists(), reason="the examples are not installed")
def test_the_command_line_proves_an_example_and_ends_with_0(tmp_path: Path):
    path = os.path.relpath(ROOT / "examples" / "digits.py")
    options = ["--strategies", "tp_fsdp", "--prove", "--json", str(tmp_path / "report.json")]
    done = CliRunner().invoke(cli.app, ["check", path, *options])
    assert done.exit_code == 0, done.output
    assert "tp_fsdp: caught 14 of 14 planted faults" in done.output
    written = json.loads((tmp_path / "report.json").read_text())
    (told,) = written["proofs"]
    assert (told["strategy"], told["caught"], len(told["planted"])) == ("tp_fsdp", 14, 14)
    assert told["left_out"]["microbatch-lost"] == "a step has one micro-batch"
    scaled = next(planted for planted in told["planted"] if planted["fault"] == "grad-scale")
    assert scaled == {
        "fault": "grad-scale",
        "place": "all gradients, times 2 (dp_shard or tp)",
        "caught": True,
        "cause": "grad-scale",
        "stage": "gradient",
        "where": "head.bias",
        "step": 0,
        "reason": "",
        "stopped": False,
    }
