"""Samples are known by their content."""

from __future__ import annotations

import torch

from shardproof.trace.leaves import leaves
from shardproof.trace.reads import digests

BATCH = {"x": torch.arange(12.0).reshape(3, 4), "y": torch.tensor([1, 2, 1])}


def test_one_digest_for_each_sample_whatever_its_place_in_the_batch() -> None:
    order = torch.tensor([2, 0, 1])
    first, second, third = digests(BATCH)
    assert len({first, second, third}) == 3
    assert digests({name: leaf[order] for name, leaf in BATCH.items()}) == (third, first, second)


def test_every_leaf_counts() -> None:
    changed = {**BATCH, "y": torch.tensor([1, 3, 1])}
    assert [a == b for a, b in zip(digests(BATCH), digests(changed), strict=True)] == [True, False, True]


def test_shapes_and_dtypes_count() -> None:
    zeros = torch.zeros(2, 4)
    assert digests(zeros)[0] == digests(zeros)[1]
    assert digests(zeros)[0] != digests(torch.zeros(2, 8))[0]
    assert digests(zeros)[0] != digests(zeros.double())[0]


def test_nan_is_itself_and_bfloat16_has_a_digest() -> None:
    nan = torch.full((1, 2), float("nan"), dtype=torch.bfloat16)
    assert digests(nan) == digests(nan.clone())
    assert digests(nan) != digests(torch.zeros_like(nan))


def test_tensors_without_a_common_first_dim_make_one_digest() -> None:
    assert len(digests((torch.zeros(3, 2), torch.zeros(4)))) == 1
    assert len(digests((torch.zeros(3, 2), torch.tensor(1.0)))) == 1


def test_an_empty_batch_has_no_samples() -> None:
    assert digests(torch.zeros(0, 2)) == ()


def test_leaves_have_paths() -> None:
    value = {"logits": torch.zeros(1), "aux": [torch.ones(1), 3, None]}
    assert [path for path, _ in leaves(value)] == ["['logits']", "['aux'][0]"]
    assert [path for path, _ in leaves(torch.zeros(1))] == [""]
    assert list(leaves("nothing")) == []
