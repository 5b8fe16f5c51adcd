"""From names and numbers to degrees, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardproof.errors import StrategyError
from shardproof.spec.parallelism import AXES, Parallelism
from shardproof.spec.strategies import FLAT, STRATEGIES, canonical_name, fitting, named, parse, suggest

DEGREES = {
    ("single", 4): (1, 1, 1),
    ("ddp", 4): (4, 1, 1),
    ("fsdp", 3): (1, 3, 1),
    ("hsdp", 4): (2, 2, 1),
    ("hsdp", 6): (2, 3, 1),
    ("tp", 4): (1, 1, 4),
    ("tp_ddp", 4): (2, 1, 2),
    ("tp_fsdp", 6): (1, 3, 2),
    ("tp_hsdp", 8): (2, 2, 2),
    ("tp_hsdp", 12): (2, 3, 2),
    ("fsdp1", 2): (1, 2, 1),
    ("tp_fsdp1", 4): (1, 2, 2),
}


def test_every_strategy_of_the_contract_is_in_the_table() -> None:
    assert set(STRATEGIES) == {name for name, _ in DEGREES}
    assert set(STRATEGIES) >= FLAT


@pytest.mark.parametrize(("name", "ranks"), DEGREES)
def test_a_name_and_a_number_of_ranks_give_degrees(name: str, ranks: int) -> None:
    found = named(name, ranks)
    assert found.degrees == DEGREES[name, ranks]
    assert found.strategy == name
    assert found.flat_parameters == (name in FLAT)


@given(name=st.sampled_from(sorted(STRATEGIES)), ranks=st.integers(1, 64))
def test_a_strategy_uses_all_ranks_and_all_its_axes_or_does_not_fit(name: str, ranks: int) -> None:
    if name not in fitting(ranks, tp=True):
        with pytest.raises(StrategyError, match=f"does not fit {ranks} ranks"):
            named(name, ranks)
        return
    found = named(name, ranks)
    used = {axis for axis in AXES if getattr(found, axis) > 1}
    assert used == set(STRATEGIES[name])
    assert found.world_size == (1 if name == "single" else ranks)


@pytest.mark.parametrize("text", ["tp_fsdp", "tp-fsdp", "TP-FSDP", " tp_fsdp "])
def test_dashes_and_capitals_are_read_as_the_name(text: str) -> None:
    assert parse(text, 4) == named("tp_fsdp", 4)


@pytest.mark.parametrize(
    ("text", "degrees"),
    [
        ("tp=2,dp_shard=3", (1, 3, 2)),
        ("dp-shard=3, tp=2", (1, 3, 2)),
        ("dp_replicate = 2", (2, 1, 1)),
        ("tp=1", (1, 1, 1)),
    ],
)
def test_explicit_degrees_bring_their_own_ranks(text: str, degrees: tuple[int, int, int]) -> None:
    assert parse(text, None).degrees == degrees
    assert parse(text, 64).degrees == degrees


def test_a_parallelism_is_taken_as_it_is() -> None:
    given_one = Parallelism(tp=2)
    assert parse(given_one, None) is given_one


@pytest.mark.parametrize(
    ("text", "ranks", "word"),
    [
        ("ddp", None, "needs a number of ranks"),
        ("tp=2,tp=2", 4, "given twice"),
        ("tp=2,dp=2", 4, "there is no axis 'dp'"),
        ("tp=", 4, "tp is ''"),
        ("tp=2,", 4, "there is no axis ''"),
        ("=2", 4, "there is no axis ''"),
        ("tp=²", 4, "whole number"),
        ("", 4, "there is no strategy ''"),
        ("fdsp", 4, "did you mean fsdp"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(text: str, ranks: int | None, word: str) -> None:
    with pytest.raises(StrategyError) as caught:
        parse(text, ranks)
    assert word in str(caught.value)


def test_fitting_lists_what_fits_and_tensor_parallelism_only_where_there_is_any() -> None:
    assert fitting(4, tp=False) == ("single", "ddp", "fsdp", "hsdp", "fsdp1")
    assert fitting(4, tp=True) == tuple(name for name in STRATEGIES if name != "tp_hsdp")
    assert fitting(1, tp=True) == ("single",)
    assert fitting(3, tp=True) == ("single", "ddp", "fsdp", "tp", "fsdp1")


def test_a_name_far_from_all_others_lists_all() -> None:
    with pytest.raises(StrategyError) as caught:
        canonical_name("zzz")
    assert "did you mean" not in str(caught.value)
    assert all(name in str(caught.value) for name in STRATEGIES)
    assert suggest("x", []) == "there are none"
