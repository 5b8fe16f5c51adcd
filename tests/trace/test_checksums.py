"""Checksums of the bits of tensors: what must show in them, and what must not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardproof.trace.checksums import CHUNK, checksums, same_bits

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.int64, torch.bool]


def drawn(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 9).to(dtype)


def checksum(tensor: Tensor) -> int:
    return int(checksums([tensor], CPU)[0])


@pytest.mark.parametrize("size", [6, CHUNK + 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_element_that_changes_shows(dtype: torch.dtype, size: int) -> None:
    whole = drawn(size, dtype)
    for at in (0, 3, size - 1):
        other = whole.clone()
        other[at] = 1 - other[at].to(torch.int8) if dtype == torch.bool else other[at] + 1
        assert checksum(other) != checksum(whole)
        assert not same_bits(whole, other)
    assert checksum(whole.clone()) == checksum(whole)


@pytest.mark.parametrize("size", [6, 2 * CHUNK, 2 * CHUNK + 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_elements_that_change_places_and_signs_that_flip_show(dtype: torch.dtype, size: int) -> None:
    whole = drawn(size, dtype)
    changed = [whole.flip(0), whole.roll(1), whole.roll(size // 2), -whole, whole.abs()]
    found = {checksum(tensor) for tensor in [whole, *changed]}
    assert len(found) == 1 + len(changed)


def test_the_bits_count_and_not_the_numbers() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits(nan, nan.clone())
    assert checksum(nan) == checksum(nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))


def test_how_a_tensor_lies_in_memory_makes_no_difference() -> None:
    whole = drawn(24).reshape(4, 6)
    strided = torch.empty(6, 4, dtype=torch.float64).t().copy_(whole)
    assert not strided.is_contiguous()
    assert checksum(strided) == checksum(whole)
    assert checksum(whole.to_sparse()) == checksum(whole)
    assert checksum(whole[:, 1:3]) == checksum(whole[:, 1:3].contiguous())


def test_many_tensors_have_the_checksums_that_each_has_alone() -> None:
    tensors = [drawn(n, dtype) for n in (0, 1, 5, CHUNK - 2, CHUNK + 3, 7) for dtype in DTYPES]
    tensors.append(torch.tensor(3.0))
    assert checksums(tensors, CPU).tolist() == [checksum(tensor) for tensor in tensors]
    assert checksums([], CPU).tolist() == []


def test_zeros_of_any_size_sum_to_zero() -> None:
    assert checksums([torch.zeros(0), torch.zeros(3), torch.zeros(CHUNK + 1)], CPU).tolist() == [0, 0, 0]


def test_no_random_number_is_drawn() -> None:
    before = torch.get_rng_state()
    checksum(drawn(8))
    assert torch.equal(torch.get_rng_state(), before)
