"""The main causes have the same name in every dtype that a run can have."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

import shardproof as sp
from diagnose.models import GATED, PICTURES, TEXT, BiasedRow, bare, edited, found, named, same, split


def three_times(step: sp.Step) -> None:
    for parameter in step.model.parameters():
        parameter.grad *= 3


FAULTS = {
    "not reduced": (replace(PICTURES, parallelize=bare), "dp_replicate=3", ("grad-not-reduced", "dp_replicate")),
    "scaled": (replace(TEXT, train_step=edited(three_times)), "dp_replicate=3", ("grad-scale", "dp_replicate")),
    "bias twice": (replace(GATED, parallelize=partial(split, row=BiasedRow)), "tp=2", ("bias-counted-k-times", "tp")),
    "forward": (replace(GATED, parallelize=partial(split, leave=same)), "tp=2", ("forward-not-reduced", "tp")),
    "norm not summed": (
        replace(GATED, parallelize=partial(split, enter=dict.fromkeys("qkv", same))),
        "tp=2",
        ("grad-not-summed", "tp"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_main_causes_are_told_in_float32_too(fault: str) -> None:
    experiment, strategy, cause = FAULTS[fault]
    assert named(found(experiment, strategy, dtype="float32", steps=1)) == cause


@pytest.mark.parametrize("fault", FAULTS)
def test_the_main_causes_are_told_in_bfloat16_too(fault: str) -> None:
    experiment, strategy, cause = FAULTS[fault]
    assert named(found(experiment, strategy, dtype="bfloat16", steps=1)) == cause


def test_a_bias_added_twice_is_told_in_bfloat16_with_the_factor_of_two() -> None:
    experiment, strategy, _ = FAULTS["bias twice"]
    first = found(experiment, strategy, dtype="bfloat16", steps=1)
    assert first.factor == 2.0
    assert "added 2 times instead of once" in first.evidence
