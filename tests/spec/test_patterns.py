"""Name patterns, read as torch's parallelize_module reads them."""

from __future__ import annotations

import pytest

from shardproof.errors import PatternError
from shardproof.spec.patterns import SHOWN, matches, select

NAMES = ["", "blocks", "blocks.0", "blocks.0.fc1", "blocks.0.fc2", "blocks.10.fc1", "head", "head_norm"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("head", ["head"]),
        ("head*", ["head", "head_norm"]),
        ("blocks.*", ["blocks.0"]),
        ("blocks.*.fc1", ["blocks.0.fc1", "blocks.10.fc1"]),
        ("blocks.?.fc[12]", ["blocks.0.fc1", "blocks.0.fc2"]),
        ("*.*.fc1", ["blocks.0.fc1", "blocks.10.fc1"]),
    ],
)
def test_each_dotted_part_is_matched_by_the_same_part_of_the_pattern(pattern: str, found: list[str]) -> None:
    assert select(NAMES, pattern, field="tp_plan") == found


def test_a_wildcard_stops_at_a_dot_and_capitals_count() -> None:
    assert not matches("blocks.0.fc1", "blocks.*")
    assert not matches("blocks.0.fc1", "*")
    assert not matches("Head", "head")


def test_a_pattern_that_matches_nothing_lists_the_nearest_names() -> None:
    with pytest.raises(PatternError) as caught:
        select(NAMES, "block.0.fc1", field="fsdp_units")
    assert "fsdp_units: 'block.0.fc1' matches no module" in str(caught.value)
    assert "near names: blocks.0.fc1" in str(caught.value)


def test_where_nothing_is_near_the_first_few_names_are_listed() -> None:
    names = [f"layer{i}" for i in range(40)]
    with pytest.raises(PatternError) as caught:
        select(names, "zzzzzz", field="tp_plan", kind="parameter")
    assert "matches no parameter" in str(caught.value)
    assert str(caught.value).count("layer") == SHOWN


def test_a_model_without_names_says_so() -> None:
    with pytest.raises(PatternError, match="no module with a name"):
        select([""], "fc1", field="tp_plan")
