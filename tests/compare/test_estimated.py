"""Noise floors from a recording alone: they hold what rounding does, and not what a bug does."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardproof.compare.estimated import Estimate
from shardproof.compare.floor import as_norm, measured
from shardproof.compare.measure import MULTIPLE, furthest
from shardproof.compare.verdict import Comparison, Verdict
from shardproof.parallel import piece
from shardproof.spec.strategies import parse
from shardproof.trace.file import TraceFile, save
from shardproof.trace.record import Record

ROOT = Path(__file__).parents[2]
EPS = torch.finfo(torch.float32).eps
Entry = tuple[Record, Tensor | None]


def entry(stage: str, name: str, tensor: Tensor | None, *, step: int = 0, part: str = "", call: int = 0) -> Entry:
    where = None if stage in ("forward", "backward") or tensor is None else piece.whole(tensor.shape)
    record = Record(step=step, stage=stage, name=name, part=part, call=call, piece=where, missing=tensor is None)
    return record, tensor


def traced(folder: Path, entries: list[Entry], name: str = "trace") -> TraceFile:
    save(folder / name, entries)
    return TraceFile(folder / name)


def told(name: str, error: float, *, step: int = 0, verdict: Verdict = Verdict.ROUNDING) -> Comparison:
    return Comparison(step=step, stage="update", name=name, verdict=verdict, error=error, floor=error)


# A step of attention, computed for real.


class Attention(nn.Module):
    """One head, with the bias of the key, whose gradient is zero in mathematics."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, 8) -> (batch, length, 8)
        q, k, v = self.q(x), self.k(x), self.v(x)
        return torch.softmax(q @ k.transpose(1, 2), -1) @ v


def one_step(optimizer: str = "adam", *, autocast: bool = False, dtype: torch.dtype = torch.float32) -> list[Entry]:
    """Everything that a step of attention shows."""
    torch.manual_seed(0)
    model = Attention().to(dtype)
    inputs = torch.randn(4, 6, 8, dtype=dtype)
    entries: list[Entry] = []
    for name, parameter in model.named_parameters():
        entries.append(entry("initial-state", name, parameter.detach().clone()))
    entries = [(replace(record, step=-1), tensor) for record, tensor in entries]
    outputs: list[tuple[str, Tensor]] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, _i, output, name=name: outputs.append((name or "(root)", output)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(inputs).float().square().mean()
    entries += [entry("forward", name, output.detach()) for name, output in outputs]
    entries.append(entry("loss", "(root)", loss.detach(), part="local"))
    gradients = torch.autograd.grad(loss, [output for _, output in reversed(outputs)], retain_graph=True)
    entries += [
        entry("backward", name, gradient) for (name, _), gradient in zip(reversed(outputs), gradients, strict=True)
    ]
    loss.backward()
    named = dict(model.named_parameters())
    entries += [entry("gradient", name, parameter.grad.clone()) for name, parameter in named.items()]
    rule: Any = (
        torch.optim.Adam(named.values(), lr=0.01) if optimizer == "adam" else torch.optim.SGD(named.values(), 0.1)
    )
    rule.step()
    for name, parameter in named.items():
        for part, state in rule.state[parameter].items():
            entries.append(entry("optimizer-state", name, state.clone(), part=part))
    return entries + [entry("update", name, parameter.detach().clone()) for name, parameter in named.items()]


def test_what_is_noise_has_a_floor_of_the_noise_and_not_of_its_own_size(tmp_path: Path) -> None:
    trace = traced(tmp_path, one_step())
    gradient = trace.tensor(trace.by_key[0, "gradient", "k.bias", ""][0])
    exact = one_step(dtype=torch.float64)
    want = next(
        tensor for record, tensor in exact if record.key == (0, "gradient", "k.bias", "") and tensor is not None
    )
    assert float(want.abs().max()) < 1e-15
    floor = Estimate(trace).floor((0, "gradient", "k.bias", ""))
    assert furthest(gradient, want) <= floor
    # It is no licence for the biases beside it.
    assert floor < 1e-4 * float(trace.tensor(trace.by_key[0, "gradient", "v.bias", ""][0]).abs().max())


def test_adam_moves_a_weight_whose_gradient_is_noise_as_far_as_any_other_and_sgd_does_not(tmp_path: Path) -> None:
    adam, sgd = (Estimate(traced(tmp_path, one_step(kind), kind)) for kind in ("adam", "sgd"))
    # Its sign may be the other one: twice the learning rate apart.
    assert MULTIPLE * adam.floor((0, "update", "k.bias", "")) >= 2 * 0.01
    assert adam.floor((0, "update", "v.bias", "")) < 1e-5
    assert sgd.floor((0, "update", "k.bias", "")) < 1e-6


def test_gradients_in_float32_carry_the_noise_of_an_autocast_to_bfloat16(tmp_path: Path) -> None:
    plain = Estimate(traced(tmp_path, one_step(), "plain"))
    coarse = Estimate(traced(tmp_path, one_step(autocast=True), "coarse"))
    key = (0, "gradient", "v.weight", "")
    assert coarse.floor(key) > 1000 * plain.floor(key)
    exact = one_step()
    rounded = one_step(autocast=True)
    want = next(tensor for record, tensor in exact if record.key == key and tensor is not None)
    got = next(tensor for record, tensor in rounded if record.key == key and tensor is not None)
    assert furthest(got, want) <= MULTIPLE * coarse.floor(key)


def test_products_that_are_rounded_more_coarsely_than_any_tensor_shows_can_be_told(tmp_path: Path) -> None:
    trace = traced(tmp_path, one_step())
    key = (0, "forward", "v", "")
    assert Estimate(trace, eps=2.0**-10).floor(key) > 100 * Estimate(trace).floor(key)


# From one step to the next.


def two_steps(folder: Path) -> TraceFile:
    """A layer of 4 x 4 and SGD, twice the same."""
    weight = torch.linspace(0.5, 1.0, 16).reshape(4, 4)
    entries = [entry("initial-state", "fc.weight", weight, step=-1)]
    for step in (0, 1):
        entries += [
            entry("forward", "fc", torch.ones(3, 4), step=step),
            entry("backward", "fc", torch.ones(3, 4), step=step),
            entry("gradient", "fc.weight", torch.ones(4, 4), step=step),
            entry("update", "fc.weight", weight - 0.1 * (step + 1), step=step),
        ]
    return traced(folder, entries)


def test_weights_that_are_apart_raise_the_floors_of_the_next_step(tmp_path: Path) -> None:
    trace = two_steps(tmp_path)
    estimate, ignorant = Estimate(trace), Estimate(trace)
    far = estimate.floor((0, "update", "fc.weight", ""))
    estimate.saw(told("fc.weight", far))
    for stage, name in (("forward", "fc"), ("gradient", "fc.weight")):
        assert estimate.floor((1, stage, name, "")) > ignorant.floor((1, stage, name, ""))
    assert estimate.floor((1, "update", "fc.weight", "")) > far


def test_weights_that_are_wrong_do_not(tmp_path: Path) -> None:
    trace = two_steps(tmp_path)
    estimate, ignorant = Estimate(trace), Estimate(trace)
    estimate.saw(told("fc.weight", 0.5, verdict=Verdict.DIFFERENT))
    assert estimate.floor((1, "forward", "fc", "")) == ignorant.floor((1, "forward", "fc", ""))


def test_a_floor_that_was_given_stays(tmp_path: Path) -> None:
    estimate = Estimate(two_steps(tmp_path))
    before = estimate.floor((1, "forward", "fc", ""))
    estimate.saw(told("fc.weight", 1e-6))
    assert estimate.floor((1, "forward", "fc", "")) == before


def test_whole_numbers_and_what_is_missing_have_no_floor(tmp_path: Path) -> None:
    entries = [
        entry("forward", "tok", torch.tensor([1, 2])),
        entry("gradient", "w", None),
        entry("optimizer-state", "w", torch.tensor(3.0), part="step"),
        entry("buffer", "seen", torch.tensor(2)),
    ]
    estimate = Estimate(traced(tmp_path, entries))
    assert [estimate[number] for number in (0, 1, 3)] == [0.0, 0.0, 0.0]
    assert estimate[2] <= 3 * EPS


# Floors by repetition, and of norms.


def test_a_measured_floor_is_the_furthest_that_a_repetition_moved(tmp_path: Path) -> None:
    want = torch.tensor([1.0, 2.0])
    entries = [entry("forward", "fc", want), entry("forward", "head", want.clone())]
    reference = traced(tmp_path, entries)
    draws = [
        traced(tmp_path, [entry("forward", "fc", want + 1e-3)], "one"),
        traced(tmp_path, [entry("forward", "fc", want * math.nan), entry("backward", "fc", want.clone())], "nan"),
        traced(tmp_path, [entry("forward", "fc", want - 2e-3)], "two"),
    ]
    assert measured(reference, draws) == {0: pytest.approx(2e-3, rel=1e-3)}
    assert measured(reference, draws[1:2]) == {}


def test_the_floor_of_a_norm_holds_every_element_at_its_floor() -> None:
    off = torch.full((64,), 0.5)
    assert as_norm(0.5, 64) == pytest.approx(float(off.norm()))


# For real: benchmarks/estimated_floors.py prints what a long run of this shows.


def benchmark() -> Any:
    for folder in ("benchmarks", "examples"):
        if str(ROOT / folder) not in sys.path:
            sys.path.insert(0, str(ROOT / folder))
    import digits
    import estimated_floors

    return estimated_floors, digits.experiment


@pytest.mark.parametrize(("strategy", "precision"), [("tp", "bfloat16"), ("fsdp", "auto")])
def test_right_code_lies_within_estimated_floors(strategy: str, precision: str) -> None:
    floors, experiment = benchmark()
    changed = replace(experiment, optimizer=floors.optimizers()["adamw"], steps=2)
    run = floors.judged("digits", changed, parse(strategy, 2), precision)
    assert run.first(measured=False) is None
    compared = [row for row in run.rows if row.verdict in ("equal", "rounding") and row.stage == "gradient"]
    # Not because they are too large to say anything.
    shares = sorted(row.estimated / row.measured for row in compared)
    assert shares[len(shares) // 2] < 100
    assert max(row.floors for row in compared) > 0


def test_a_bug_is_found_where_measured_floors_find_it() -> None:
    floors, _ = benchmark()
    run = next(floors.zoo(floors.BUGS, "weighted_nll_mean"))()
    first = run.first(measured=False)
    assert first is not None
    assert first == run.first(measured=True)
