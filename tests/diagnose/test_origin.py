"""Its own error or one it was handed: what else differs, and what of that follows from the first."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

import shardproof as sp
from diagnose.models import GATED, TEXT, BiasedRow, at, edited, found, gradient, split


def test_what_follows_from_the_first_wrong_output_is_counted_as_polluted() -> None:
    report = sp.check(replace(GATED, parallelize=partial(split, row=BiasedRow)), ("tp=2",), steps=1)
    first = report.first
    assert first is not None
    assert at(first) == ("forward", 0, "down")
    different = report.runs[0].verdicts["different"]
    assert first.polluted == different - 1
    assert f"{different - 1} later tensors differ as well" in first.evidence
    assert "of its own as well" not in first.evidence, "the root is wrong because of what it holds"
    assert "give the same on one device when fed this run's own input" in first.evidence


def test_a_second_fault_is_named_beside_the_first_and_is_not_polluted() -> None:
    def layout(model: Any, mesh: Any, parallelism: sp.Parallelism) -> nn.Module:
        model = split(model, mesh, parallelism, row=BiasedRow)
        model.head.register_forward_hook(lambda _m, _a, out: out + 0.5)
        return model

    report = sp.check(replace(GATED, parallelize=layout), ("tp=2",), steps=1)
    first = report.first
    assert first is not None
    assert (first.cause, first.where) == ("bias-counted-k-times", "down")
    assert re.search(r"\bhead\b.* wrong of its own as well", first.evidence)
    assert first.polluted < report.runs[0].verdicts["different"] - 1


def test_nothing_is_polluted_where_one_tensor_of_the_last_stage_differs() -> None:
    def one(step: sp.Step) -> None:
        gradient(step, "head.bias")[0] += 0.1

    first = found(replace(TEXT, train_step=edited(one)), "dp_replicate=2", steps=1)
    assert first.polluted == 1, "the weight that this gradient moved"
