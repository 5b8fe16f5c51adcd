"""The fields of a training, and what is refused."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import get_type_hints

import pytest

import shardproof as sp
from shardproof import cli_train
from shardproof.spec.duration import Duration, parse_duration
from shardproof.spec.training import Changes


def test_every_field_can_be_a_keyword_of_the_trainer() -> None:
    assert list(Changes.__annotations__) == [field.name for field in fields(sp.Training)]
    types = {field.name: field.type for field in fields(sp.Training)}
    assert {name: annotation.__forward_arg__ for name, annotation in Changes.__annotations__.items()} == types


def test_every_option_of_the_command_line_is_a_field_or_says_how_to_run() -> None:
    others = {"experiment", "strategy", "ranks", "resume", "meta", "json", "tensorboard", "export", "timeout", "quiet"}
    options = set(inspect.signature(cli_train.train).parameters)
    assert options - others <= {field.name for field in fields(sp.Training)}
    assert others <= options
    assert get_type_hints(cli_train.train)


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("2ep", Duration(2, "ep")),
        ("500 ba", Duration(500, "ba")),
        ("100000SP", Duration(100000, "sp")),
        ("90s", Duration(90, "s")),
        ("30min", Duration(1800, "s")),
        ("1.5h", Duration(5400, "s")),
        ("1d", Duration(86400, "s")),
    ],
)
def test_durations_are_read(text: str, means: Duration) -> None:
    assert parse_duration(text) == means


@pytest.mark.parametrize("text", ["2", "ep", "0ba", "-1ep", "1.5ep", "3weeks", "", None, 5])
def test_what_is_no_duration_is_refused_with_examples(text: object) -> None:
    with pytest.raises(sp.UsageError, match="eval_interval=") as raised:
        parse_duration(text, field="eval_interval")
    assert any(word in str(raised.value) for word in ("2ep", "whole number", "longer than nothing"))
