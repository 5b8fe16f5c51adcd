"""What every finding brings: hypotheses with residuals, numbers, one sentence that says what to change."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial

import pytest

import shardproof as sp
from diagnose.models import GATED, PICTURES, BiasedRow, at, bare, edited, found, gradient, named, numbers, same, split
from shardproof.diagnose import explain
from shardproof.diagnose.case import Case
from shardproof.diagnose.finding import CAUSES


def noise(step: sp.Step) -> None:
    grad = gradient(step, "conv.weight")
    grad += numbers(*grad.shape, seed=7)


FAULTS: dict[str, tuple[sp.Experiment, str]] = {
    "noise": (replace(PICTURES, train_step=edited(noise)), "dp_replicate=2"),
    "not reduced": (replace(PICTURES, parallelize=bare), "dp_replicate=2"),
    "not summed": (replace(GATED, parallelize=partial(split, enter=dict.fromkeys("qkv", same))), "tp=2"),
    "biased": (replace(GATED, parallelize=partial(split, row=BiasedRow)), "tp=2"),
}


@pytest.fixture(scope="module", params=FAULTS)
def first(request: pytest.FixtureRequest) -> sp.Finding:
    experiment, strategy = FAULTS[request.param]
    return found(experiment, strategy, steps=1)


def test_a_finding_carries_what_was_tried_and_what_that_left_unexplained(first: sp.Finding) -> None:
    assert first.cause in CAUSES
    assert first.tried
    holds = [hypothesis for hypothesis in first.tried if hypothesis.holds]
    assert bool(holds) == (first.cause != "unexplained")
    for hypothesis in first.tried:
        assert hypothesis.name
        assert hypothesis.residual >= 0
        assert math.isfinite(hypothesis.residual) or not hypothesis.holds


def test_what_was_ruled_out_is_said_where_nothing_fits(first: sp.Finding) -> None:
    for hypothesis in first.tried:
        assert (hypothesis.name in first.evidence) or first.cause != "unexplained"


def test_the_evidence_has_numbers_and_the_fix_is_one_sentence(first: sp.Finding) -> None:
    assert re.search(r"max\|got - want\| = [0-9.e+-]+, [0-9.e+-]+ noise floors", first.evidence)
    assert re.search(r"\d+ later tensors? differs? as well", first.evidence)
    assert first.polluted > 0
    assert 20 < len(first.fix) < 250
    assert "\n" not in first.fix
    assert not re.search(r"[.!?] [A-Z]", first.fix)
    assert not first.fix.endswith(".")


def test_a_family_that_raises_does_not_cost_the_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case) -> None:
        raise ZeroDivisionError("of the family's own")

    families = {**explain.FAMILIES, "gradient": (broken, *explain.FAMILIES["gradient"])}
    monkeypatch.setattr(explain, "FAMILIES", families)
    first = found(replace(PICTURES, parallelize=bare), "dp_replicate=2", steps=1)
    assert named(first) == ("grad-not-reduced", "dp_replicate")
    assert "ZeroDivisionError('of the family's own')" in first.tried[0].name.replace('"', "'")
    assert not first.tried[0].holds


def test_a_finding_is_unexplained_where_every_family_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(explain, "FAMILIES", dict.fromkeys(explain.FAMILIES, (broken,)))
    first = found(replace(PICTURES, parallelize=bare), "dp_replicate=2", steps=1)
    assert (named(first), at(first)) == (("unexplained", None), ("gradient", 0, "head.bias"))
