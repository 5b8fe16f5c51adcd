"""`sp.record` changes nothing that a loop computes, keeps nothing alive, and leaves nothing behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loops import CHECKPOINTS, Model, built, events, outcome, same, shown, trace_of, train
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils import clip_grad

import shardproof as sp


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("checkpointed", CHECKPOINTS, ids=[name or "plain" for name in CHECKPOINTS])
def test_losses_weights_buffers_and_random_numbers_are_the_same(tmp_path: Path, checkpointed: str, amp: bool) -> None:
    model, optimizer = built(lambda: Model(checkpointed))
    bare = outcome(model, train(model, optimizer, microbatches=2, amp=amp))
    model, optimizer = built(lambda: Model(checkpointed))
    with sp.record(tmp_path, model, optimizer, steps=[0, 2]):
        losses = train(model, optimizer, microbatches=2, amp=amp)
    assert same(bare, outcome(model, losses))
    trace = trace_of(tmp_path)
    # Recomputation is no new call, and every output has its gradient, whenever its graph came into being.
    seen = {stage: [(r.step, r.name, r.call) for r in trace.records if r.stage == stage] for stage in STAGES}
    assert len(seen["forward"]) == len(set(seen["forward"])) == 2 * 2 * 12
    assert sorted(seen["backward"]) == sorted(seen["forward"])


STAGES = ("forward", "backward")


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["model", "in place", "blocks"])
@pytest.mark.usefixtures("compiler")
# Torch's own, of what comes out of one compiled region and goes into the next.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_code_is_compiled_alike(tmp_path: Path, how: str) -> None:
    backend = "aot_eager"

    def compiled() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 4), nn.ReLU()))
        if how == "in place":
            model.compile(backend=backend)
        if how == "blocks":
            model[2] = torch.compile(model[2], backend=backend)
        return torch.compile(model, backend=backend) if how == "model" else model

    def graphs() -> dict[str, int]:
        found = {**counters["stats"], "breaks": sum(counters["graph_break"].values())}
        torch._dynamo.reset()
        counters.clear()
        return found

    model, optimizer = built(compiled)
    bare, alone = outcome(model, train(model, optimizer)), graphs()
    model, optimizer = built(compiled)
    with sp.record(tmp_path, model, optimizer, steps=[0, 2]):
        losses = train(model, optimizer)
    assert same(bare, outcome(model, losses))
    assert graphs() == alone
    trace = trace_of(tmp_path)
    assert events(trace, "compiled")[0]["modules"] == (["2"] if how == "blocks" else ["(root)"])
    inside = {"0", "1", "2"} if how == "blocks" else set()
    assert {r.name for r in trace.records if r.stage == "forward"} == {"(root)"} | inside
    assert {r.name for r in trace.records if r.stage == "backward"} == {"(root)"} | inside
    assert shown(trace, "gradient", "2.0.weight", step=2)[0] is not None


def test_no_graph_outlives_its_step(tmp_path: Path) -> None:
    model, optimizer = built(Model)
    kept: list[weakref.ref[Tensor]] = []

    def keep(_module: nn.Module, _args: object, output: Tensor) -> None:
        kept.append(weakref.ref(output))

    model.blocks[0].up.register_forward_hook(keep)
    gc.disable()
    try:
        with sp.record(tmp_path, model, optimizer, steps=range(2)):
            train(model, optimizer, steps=1)
            # Not even until the garbage collector runs.
            assert [output() for output in kept] == [None]
    finally:
        gc.enable()


def test_a_recording_that_is_over_keeps_neither_model_nor_optimizer_alive(tmp_path: Path) -> None:
    model, optimizer = built(Model)
    gc.disable()
    try:
        with sp.record(tmp_path, model, optimizer, steps=range(1)) as rec:
            train(model, optimizer, steps=2)
            # The last step to record is over, the `with` is not.
            left = (weakref.ref(model), weakref.ref(optimizer))
            del model, optimizer
            assert [ref() for ref in left] == [None, None]
        assert rec.step == 1
    finally:
        gc.enable()


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def swapped() -> list[object]:
    return [
        torch.autograd.backward,
        clip_grad._clip_grads_with_norm_,
        torch.nn.utils.clip_grad_value_,
        torch.amp.GradScaler.step,
    ]


def test_outside_of_recorded_steps_only_steps_are_counted(tmp_path: Path) -> None:
    model, optimizer = built(Model)
    before, found = swapped(), []

    def look() -> None:
        found.append((hooks_on(model) > 0, swapped() != before, len(optimizer._optimizer_step_post_hooks)))

    with sp.record(tmp_path, model, optimizer, steps=[1, 3]):
        look()
        train(model, optimizer, steps=5, after=look)
    # Before steps 0 to 5: hooks on modules, functions of torch seen through, step hooks.
    idle, busy, over = (False, False, 1), (True, True, 1), (False, False, 0)
    assert found == [idle, busy, idle, busy, over, over]


def test_an_exception_leaves_what_was_recorded_and_nothing_else(tmp_path: Path) -> None:
    model, optimizer = built(Model)
    before = swapped()

    def fail() -> None:
        raise KeyboardInterrupt("enough")

    with pytest.raises(KeyboardInterrupt, match="enough"), sp.record(tmp_path, model, optimizer):
        train(model, optimizer, after=fail)
    trace = trace_of(tmp_path)
    assert shown(trace, "update", "head.weight")
    assert events(trace, "aborted") == [
        {"event": "aborted", "step": 1, "exception": "KeyboardInterrupt", "message": "enough"}
    ]
    assert swapped() == before
    assert hooks_on(model) == len(optimizer._optimizer_step_post_hooks) == 0


def test_two_models_are_recorded_at_once(tmp_path: Path) -> None:
    before = swapped()
    (first, one), (second, other) = built(Model), built(Model)
    with sp.record(tmp_path / "a", first, one, steps=[0]), sp.record(tmp_path / "b", second, other, steps=range(2)):
        train(first, one, steps=2)
        train(second, other, steps=2)
    assert swapped() == before
    assert len(shown(trace_of(tmp_path / "a"), "grad-norm", "(root)", "norm")) == 1
    assert len(shown(trace_of(tmp_path / "b"), "grad-norm", "(root)", "norm", step=1)) == 1


def test_evaluation_of_an_encoder_layer_keeps_its_fast_path(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 3, 8)
    fast: list[int] = []
    before = torch._transformer_encoder_layer_fwd

    def evaluated() -> None:
        model.eval()
        with torch.no_grad():
            model(x)
        model.train()

    def counted(*args: object, **kwargs: object) -> Tensor:
        fast.append(1)
        return before(*args, **kwargs)

    torch._transformer_encoder_layer_fwd = counted
    try:
        with sp.record(tmp_path, model, optimizer):
            evaluated()
            model(x).sum().backward()
            evaluated()
            optimizer.step()
    finally:
        torch._transformer_encoder_layer_fwd = before
    assert len(fast) == 2
    assert shown(trace_of(tmp_path), "forward", "0.linear1")
