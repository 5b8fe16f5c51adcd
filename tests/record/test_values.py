"""What `sp.record` writes of a loop on one device, held against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loops import Model, built, events, of, shown, trace_of, train
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import shardproof as sp
from shardproof.trace.reads import digests


class Scale(nn.Module):
    """y = w x, so that everything can be worked out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 1, bias=False)
        self.register_buffer("seen", torch.zeros(()))
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[1.0, 2.0]]))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.shape[0]
        return self.fc(x)


def test_every_stage_of_a_step_is_what_it_should_be(tmp_path: Path) -> None:
    model = Scale()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    with sp.record(tmp_path, model, optimizer):
        model(x).sum().backward()
        # Imported by its name: a loop may have taken hold of it before anything was recorded.
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    trace = trace_of(tmp_path)
    assert shown(trace, "initial-state", "fc.weight", step=-1)[0].tolist() == [[1, 2]]
    assert shown(trace, "initial-state", "seen", step=-1)[0].item() == 0
    assert shown(trace, "batch", "batch", "[0][0]")[0].tolist() == x.tolist()
    assert of(trace, "batch", "batch", "[0][0]")[0][1].samples == digests(x)
    assert shown(trace, "forward", "fc")[0].tolist() == [[1], [4]]
    assert shown(trace, "forward", "(root)")[0].tolist() == [[1], [4]]
    assert shown(trace, "loss", "(root)", "backward")[0].item() == 5
    assert shown(trace, "backward", "fc")[0].tolist() == [[1], [1]]
    assert shown(trace, "gradient", "fc.weight")[0].tolist() == [[1, 2]]
    assert shown(trace, "grad-norm", "(root)", "norm")[0].item() == pytest.approx(5**0.5)
    clipped = torch.tensor([[1.0, 2.0]]) * 0.5 / 5**0.5
    assert torch.allclose(shown(trace, "grad-norm", "fc.weight", "clipped")[0], clipped)
    assert torch.allclose(shown(trace, "optimizer-state", "fc.weight", "momentum_buffer")[0], clipped)
    assert torch.equal(shown(trace, "update", "fc.weight")[0], model.fc.weight.detach())
    assert shown(trace, "buffer", "seen")[0].item() == 2


def test_records_stand_in_the_order_in_which_one_causes_the_next(tmp_path: Path) -> None:
    model, optimizer = built(Model)
    with sp.record(tmp_path, model, optimizer, steps=[0]):
        train(model, optimizer, steps=1)
    stages = [record.stage for record in trace_of(tmp_path).records]
    assert list(dict.fromkeys(stages)) == [
        "initial-state",
        "batch",
        "forward",
        "loss",
        "backward",
        "gradient",
        "grad-norm",
        "optimizer-state",
        "update",
        "buffer",
    ]


def test_micro_batches_are_counted_and_evaluation_is_told_apart(tmp_path: Path) -> None:
    model, optimizer = built(Model)

    def evaluate() -> None:
        with torch.no_grad():
            model(torch.ones(5, 4))
        with torch.inference_mode():
            model(torch.ones(5, 4))
        model.eval()
        model(torch.ones(5, 4))
        model.train()

    with sp.record(tmp_path, model, optimizer, steps=range(2)):
        train(model, optimizer, microbatches=2, after=evaluate)
    trace = trace_of(tmp_path)
    assert [record.call for _, record in of(trace, "batch", "batch", "[0][0]")] == [0, 1]
    assert [record.call for _, record in of(trace, "forward", "blocks.1.up", step=1)] == [0, 1]
    assert [record.call for _, record in of(trace, "loss", "(root)", "backward", step=1)] == [0, 1]
    assert {tuple(v.shape) for v in shown(trace, "forward", "(root)", step=1)} == {(3, 2)}
    assert [(e["microbatches"], e["evaluations"]) for e in events(trace, "step")] == [(2, 0), (2, 3)]


def test_several_passes_before_one_backward_are_one_micro_batch(tmp_path: Path) -> None:
    model, optimizer = built(Model)
    with sp.record(tmp_path, model, optimizer):
        (model(torch.randn(3, 4)).sum() + model(torch.randn(3, 4)).sum()).backward()
        optimizer.step()
    trace = trace_of(tmp_path)
    assert [(r.part, r.call) for r in trace.records if r.stage == "batch"] == [("[0][0]", 0), ("+1[0][0]", 0)]
    assert [record.call for _, record in of(trace, "forward", "(root)")] == [0, 1]


def test_steps_that_are_not_consecutive_start_from_what_the_step_before_left(tmp_path: Path) -> None:
    model, optimizer = built(Model)
    left: list[Tensor] = []
    with sp.record(tmp_path, model, optimizer, steps=[1, 4]):
        train(model, optimizer, steps=5, after=lambda: left.append(model.head.weight.detach().clone()))
    trace = trace_of(tmp_path)
    assert torch.equal(shown(trace, "initial-state", "head.weight", step=0)[0], left[0])
    assert shown(trace, "initial-state", "head.weight", "exp_avg", step=0)
    assert torch.equal(shown(trace, "update", "head.weight", step=3)[0], left[3])
    assert torch.equal(shown(trace, "update", "head.weight", step=4)[0], left[4])
    assert {record.step for record in trace.records if record.stage == "forward"} == {1, 4}


def test_what_and_names_leave_out_the_rest(tmp_path: Path) -> None:
    model, optimizer = built(Model)
    with sp.record(tmp_path, model, optimizer, what={"loss": "full", "forward": "stats"}, names=("blocks.*.up",)):
        train(model, optimizer, steps=1)
    trace = trace_of(tmp_path)
    depths = {(r.stage, r.name): trace.depth(n) for n, r in enumerate(trace.records)}
    assert depths == {
        ("loss", "(root)"): "full",
        ("forward", "blocks.0.up"): "stats",
        ("forward", "blocks.1.up"): "stats",
    }


def test_a_part_that_the_loop_calls_by_itself_is_seen(tmp_path: Path) -> None:
    model, optimizer = built(Model)
    with sp.record(tmp_path, model, optimizer):
        model.head(model.enter(torch.randn(3, 4))).sum().backward()
        optimizer.step()
    trace = trace_of(tmp_path)
    assert [record.part for record in trace.records if record.stage == "batch"] == ["enter:[0][0]", "head:+1[0][0]"]
    assert {record.name for record in trace.records if record.stage == "forward"} == {"enter", "head"}
    missing = {record.name for record in trace.records if record.stage == "gradient" and record.missing}
    assert missing == {"norm.weight", "norm.bias"} | {
        f"blocks.{i}.{part}.{kind}" for i in (0, 1) for part in ("up", "down") for kind in ("weight", "bias")
    }


def test_a_closure_that_computes_the_gradients_is_followed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    x = torch.randn(3, 4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with sp.record(tmp_path, model, optimizer, steps=[0]):
        optimizer.step(closure)
    trace = trace_of(tmp_path)
    calls = len(shown(trace, "loss", "(root)", "backward", 0))
    assert calls == len(of(trace, "forward", "(root)")) == events(trace, "step")[0]["microbatches"] >= 2
    assert torch.equal(shown(trace, "gradient", "head.weight")[0], model.head.weight.grad)
    assert torch.equal(shown(trace, "update", "head.weight")[0], model.head.weight.detach())


@pytest.mark.parametrize("given", [True, False], ids=["given", "found by itself"])
def test_a_step_of_two_optimizers_ends_with_the_second(tmp_path: Path, given: bool) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"generator": nn.Linear(2, 2), "judge": nn.Linear(2, 1)})
    both = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model.values()]
    stranger = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)

    with sp.record(tmp_path, model, both if given else None, steps=range(2)):
        for _ in range(2):
            for optimizer in both if given else both[:1]:
                optimizer.zero_grad()
                model["judge"](model["generator"](torch.ones(1, 2))).sum().backward()
                optimizer.step()
            stranger.step()
    trace = trace_of(tmp_path)
    assert [event["microbatches"] for event in events(trace, "step")] == ([2, 2] if given else [1, 1])
    gradients = [record.name for record in trace.records if record.stage == "gradient" and record.step == 1]
    assert sorted(gradients) == sorted(name for name, _ in model.named_parameters())
    if given:
        assert gradients[:2] == ["generator.bias", "generator.weight"], "each when its own optimizer steps"


def test_a_step_that_the_gradient_scaler_skips_is_tried_again(tmp_path: Path) -> None:
    model = Scale()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with sp.record(tmp_path, model, optimizer, steps=[0]):
        for value in (torch.inf, 1.0):
            optimizer.zero_grad()
            scaler.scale(model(torch.full((1, 2), value)).sum()).backward()
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 1e9)
            scaler.step(optimizer)
            scaler.update()
    trace = trace_of(tmp_path)
    assert [event["event"] for event in trace.events] == ["layout", "skipped", "step", "closed"]
    assert events(trace, "step")[0]["loss_scale"] == 2.0
    first, second = shown(trace, "gradient", "fc.weight")
    assert not first.isfinite().any()
    assert second.tolist() == [[1, 1]]
    assert [record.call for _, record in of(trace, "forward", "fc")] == [0, 0], "counted anew"


def test_a_disturbed_run_starts_one_unit_away_and_says_so(tmp_path: Path) -> None:
    starts = {}
    for name, seed in (("plain", None), ("a", 1), ("again", 1), ("b", 2)):
        model, optimizer = built(Model)
        with sp.record(tmp_path / name, model, optimizer, steps=[1], disturb=seed):
            train(model, optimizer, steps=2)
        trace = trace_of(tmp_path / name)
        starts[name] = shown(trace, "initial-state", "head.weight")[0]
        assert trace.header["disturb"] == seed
        assert [event["seed"] for event in events(trace, "disturbed")] == ([] if seed is None else [seed])
    away = (starts["a"] / starts["plain"] - 1).abs()
    assert 0 < away.max() <= 2 * torch.finfo(torch.float32).eps
    assert torch.equal(starts["a"], starts["again"])
    assert not torch.equal(starts["a"], starts["b"])


def test_a_wrapper_may_be_attached_in_the_middle_of_a_step(tmp_path: Path) -> None:
    model, optimizer = built(Model)
    with sp.record(tmp_path, model, optimizer, steps=[0]) as rec:
        model(torch.randn(3, 4)).sum().backward()
        wrapped = nn.DataParallel(model)
        rec.attach(model=wrapped)
        wrapped(torch.randn(3, 4)).sum().backward()
        optimizer.step()
    trace = trace_of(tmp_path)
    assert [record.call for _, record in of(trace, "batch", "batch", "[0][0]")] == [0, 1]
    assert [record.call for _, record in of(trace, "forward", "head")] == [0, 1]
    assert [event["wrappers"] for event in events(trace, "layout")] == [{}, {"DataParallel": ["(root)"]}]


class Wrapper(nn.Module):
    """As Lightning Fabric's: it holds what it is around twice."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._forward_module = self._original_module = module

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_module(x)


def test_names_are_the_users_own_under_a_wrapper_of_fabric(tmp_path: Path) -> None:
    model, optimizer = built(Model)
    wrapped = type("_FabricModule", (Wrapper,), {"__module__": "lightning.fabric.wrappers"})(model)
    with sp.record(tmp_path, wrapped, optimizer, steps=[0]):
        train(wrapped, optimizer, steps=1)
    trace = trace_of(tmp_path)
    modules = {name or "(root)" for name, _ in model.named_modules()} - {"blocks"}
    assert {record.name for record in trace.records if record.stage == "forward"} == modules
    assert {record.name for record in trace.records if record.stage == "update"} == dict(
        model.named_parameters()
    ).keys()
    assert len(of(trace, "forward", "(root)")) == 1
    assert events(trace, "layout")[0]["wrappers"] == {"_FabricModule": ["(root)"]}
