"""Ranks that show the same share what is known of them, and no rank gets another's."""

from __future__ import annotations

from shardproof.trace.record import Record
from shardproof.trace.trace import Alike, numbers_by_key


def shown(*names: str, unknown: str = "") -> list[Record]:
    return [Record(step=0, stage="gradient", name=name, unknown=name == unknown) for name in names]


def test_every_rank_gets_its_own_numbers() -> None:
    alike = Alike()
    ranks = [shown("a", "b", "a"), shown("a", "b", "a"), shown("a", "b"), shown(), shown("a", "b", "a", unknown="b")]
    found = [alike.numbers_by_key(records) for records in ranks]
    assert found == [numbers_by_key(records) for records in ranks]
    assert found[0] is found[1]
