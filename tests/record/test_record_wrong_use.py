"""Each wrong use of `sp.record` gets one clear word, and what is built late may still be attached."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Model, built, events, trace_of, train
from torch import nn

import shardproof as sp


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": ()}, "holds no step"),
        ({"steps": 3}, r"range\(3\)"),
        ({"steps": [-1]}, "-1 is no step"),
        ({"what": "everything"}, "full, sketch, stats"),
        ({"what": {"gradients": "full"}}, "did you mean gradient"),
        ({"what": {"gradient": "all"}}, "no such depth"),
        ({"names": ()}, "give patterns"),
        ({"parallelism": "fdsp"}, "did you mean fsdp"),
        ({"disturb": 0.1}, "whole number"),
        ({"mesh": "tp"}, "DeviceMesh"),
        ({"model": "a model"}, "is no nn.Module"),
        ({"optimizer": [1]}, "no torch.optim.Optimizer"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_arguments_that_cannot_be_meant_are_refused_at_once(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(sp.UsageError, match=said):
        sp.record(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_names_that_match_nothing_are_refused_when_the_model_is_seen(tmp_path: Path) -> None:
    model, optimizer = built(Model)
    with (
        pytest.raises(sp.PatternError, match=r"blocks\.\*\.upp.*near names.*blocks\.0\.up"),
        sp.record(tmp_path, model, optimizer, names=("blocks.*.upp",)),
    ):
        train(model, optimizer)


def test_a_model_is_recorded_once_at_a_time(tmp_path: Path) -> None:
    model, optimizer = built(Model)
    with sp.record(tmp_path / "a", model, optimizer, steps=[0]):
        with pytest.raises(sp.UsageError, match="is being recorded already"), sp.record(tmp_path / "b", model):
            pass
        train(model, optimizer, steps=1)
    assert not (tmp_path / "b").exists()


def test_nothing_is_attached_after_the_last_step(tmp_path: Path) -> None:
    model, optimizer = built(Model)
    with sp.record(tmp_path, model, optimizer, steps=[0]) as rec:
        train(model, optimizer)
        with pytest.raises(sp.UsageError, match="the last step to record is over"):
            rec.attach(model=model)


def test_another_model_is_refused_once_one_is_recorded(tmp_path: Path) -> None:
    model, optimizer = built(Model)
    with sp.record(tmp_path, model, optimizer) as rec:
        train(model, optimizer, steps=1)
        with pytest.raises(sp.UsageError, match="ModuleDict"):
            rec.attach(model=nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("loop", "said"),
    [
        (lambda rec, model, optimizer: None, "no model was given"),
        (lambda rec, model, optimizer: rec.attach(model, optimizer), "was not called in training"),
        (lambda rec, model, optimizer: (rec.attach(model), train(model, optimizer, steps=1)), "none of them"),
    ],
    ids=["no model", "no training", "other steps"],
)
def test_a_recording_of_nothing_says_why(tmp_path: Path, loop: Callable[..., Any], said: str) -> None:
    with pytest.warns(UserWarning, match=said), sp.record(tmp_path, steps=[7]) as rec:
        loop(rec, *built(Model))


def test_an_optimizer_of_another_models_parameters_is_told(tmp_path: Path) -> None:
    model, _ = built(Model)
    late, optimizer = built(Model)
    with sp.record(tmp_path, model, optimizer):
        with pytest.warns(UserWarning, match="AdamW does not hold a single parameter of the model"):
            model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
    facts = events(trace_of(tmp_path), "layout")[0]
    assert len(facts["strangers"]) == 9
    assert facts["strangers"][0] == "AdamW: group 0, parameter 0, shape (4, 4)"
    assert facts["strangers"][-1] == f"and {len(list(late.parameters())) - 8} more"
    assert facts["left_behind"] == [name for name, _ in model.named_parameters()]


def test_model_wrapper_and_optimizer_may_come_later(tmp_path: Path) -> None:
    with sp.record(tmp_path, steps=[0]) as rec:
        model, _ = built(Model)
        rec.attach(model=model)
        wrapped = torch.nn.DataParallel(model)
        rec.attach(model=wrapped)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        rec.attach(optimizer=optimizer)
        train(wrapped, optimizer)
    trace = trace_of(tmp_path)
    facts = events(trace, "layout")[0]
    assert facts["wrappers"] == {"DataParallel": ["(root)"]}
    assert facts["optimizers"] == ["AdamW"]
    assert {record.step for record in trace.records} == {-1, 0}
    assert "blocks.0.up" in {record.name for record in trace.records if record.stage == "forward"}


def test_what_was_meant_is_kept_beside_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = built(Model)
    with sp.record(tmp_path / "a", model, optimizer, parallelism="FSDP"):
        train(model, optimizer, steps=1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with sp.record(tmp_path / "b", model, optimizer):
        train(model, optimizer, steps=1)
    assert [events(trace_of(tmp_path / name), "layout")[0]["declared"] for name in "ab"] == ["fsdp", "fsdp"]


def test_the_public_name_can_be_called_whatever_was_imported_first(tmp_path: Path) -> None:
    # Where the room is imported before the name is first used, it is the room that `sp.record` finds.
    with pytest.raises(sp.UsageError, match="holds no step"):
        importlib.import_module("shardproof.record")(tmp_path, steps=())
