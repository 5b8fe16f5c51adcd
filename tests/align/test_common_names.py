"""Names of two recordings: rules, prefixes, and suggestions a reader can copy."""

from __future__ import annotations

import pytest

import shardproof as sp
from shardproof.align.names import Rule, renamed, suggestions, without_prefix

OURS = {
    "embed.weight": (64, 16),
    "blocks.0.attn.q.weight": (16, 16),
    "blocks.0.mlp.up.weight": (32, 16),
    "blocks.1.attn.q.weight": (16, 16),
    "blocks.1.mlp.up.weight": (32, 16),
}
THEIRS = {
    "model.embed_tokens.weight": (64, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (32, 16),
    "model.layers.1.self_attn.q_proj.weight": (16, 16),
    "model.layers.1.mlp.up_proj.weight": (32, 16),
}


def test_a_rule_renames_modules_and_parameters_of_every_layer() -> None:
    rule = Rule.parse("model.layers.*.self_attn*=blocks.*.attn*")
    assert renamed("model.layers.3.self_attn.weight", [rule]) == "blocks.3.attn.weight"
    assert renamed("model.layers.11.self_attn", [rule]) == "blocks.11.attn"
    assert renamed("lm_head", [rule]) == "lm_head"


def test_the_first_rule_that_matches_wins() -> None:
    rules = [Rule.parse("a.b*=x*"), Rule.parse("a*=y*")]
    assert [renamed(name, rules) for name in ("a.b.c", "a.c")] == ["x.c", "y.c"]


def test_signs_of_a_pattern_language_are_plain_letters() -> None:
    assert renamed("a+b", [Rule.parse("a+b=c")]) == "c"
    assert renamed("aab", [Rule.parse("a+b=c")]) == "aab"


@pytest.mark.parametrize("text", ["", "a", "=b", "a=b=c", "a=*", "a.*=b.*.*"])
def test_what_is_no_rule_is_refused_with_the_way_to_write_one(text: str) -> None:
    with pytest.raises(sp.UsageError, match="map"):
        Rule.parse(text)


def test_a_wrappers_prefix_is_found_where_all_names_and_shapes_agree() -> None:
    wrapped = {f"net.{name}": shape for name, shape in OURS.items()}
    assert without_prefix(wrapped, OURS) == "net."
    assert without_prefix(OURS, wrapped) is None
    assert without_prefix({**wrapped, "net.embed.weight": (64, 17)}, OURS) is None
    assert without_prefix(OURS, OURS) is None


def test_suggested_rules_make_the_names_meet() -> None:
    rules = suggestions(THEIRS, OURS)
    assert {renamed(name, rules) for name in THEIRS} == set(OURS)


def test_a_prefix_alone_is_suggested_as_one_rule() -> None:
    theirs = {f"net.{name}": shape for name, shape in OURS.items()} | {"extra": (3,)}
    assert [str(rule) for rule in suggestions(theirs, OURS)] == ["net.*=*"]


def test_nothing_is_suggested_where_shapes_do_not_pair_up() -> None:
    assert suggestions({"a.weight": (2, 2)}, {"b.weight": (3, 3)}) == []
    assert suggestions({"a.weight": (2, 2), "c.weight": (2, 2)}, {"b.weight": (2, 2)}) == []
