"""Large tensors are judged chunk by chunk: what comes out is what the whole, widened to float64, would give."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardproof.compare import stream
from shardproof.compare.measure import MULTIPLE, Pair, constant_ratio, furthest, judge, scale, worst
from shardproof.compare.stream import chunks

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
SPECIAL = [0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), 1e-40, 3e38, -3e38, 2.0**-24, 1 + 2.0**-23]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few elements make many chunks, and a chunk several rows."""
    monkeypatch.setattr(stream, "CHUNK_BYTES", 64)
    monkeypatch.setattr(stream, "ROW", 4)


# What the streams have to give, written out for whole tensors.


def whole_distance(got: Tensor, want: Tensor) -> Tensor:
    far = (got.double() - want.double()).abs()
    if not (got.is_floating_point() or want.is_floating_point()):
        far = far.clamp(min=1.0)
    return torch.where(got == want, 0.0, far)


def whole_furthest(got: Tensor, want: Tensor) -> float:
    far = whole_distance(got, want)
    return float(far.max()) if far.numel() else 0.0


def whole_scale(tensor: Tensor) -> float:
    values = tensor.double().abs()
    return float(torch.where(values.isfinite(), values, 0.0).max()) if values.numel() else 0.0


def whole_ratio(pairs: list[Pair], floor: float) -> float | None:
    got = torch.cat([pair.got.double().reshape(-1) for pair in pairs])
    want = torch.cat([pair.want.double().reshape(-1) for pair in pairs])
    square = float(want @ want)
    if not square > 0 or not bool(got.isfinite().all()):
        return None
    ratio = float(got @ want) / square
    residual, size = float((got - ratio * want).abs().max()), float(want.abs().max())
    if not residual <= MULTIPLE * floor * max(1.0, abs(ratio)) or abs(ratio - 1) * size <= MULTIPLE * floor:
        return None
    return None if abs(ratio) * size <= MULTIPLE * floor else ratio


def same(one: float | None, other: float | None) -> bool:
    return one == other or (one is not None and other is not None and math.isnan(one) and math.isnan(other))


@st.composite
def sides(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two tensors of one shape: of any dtypes, apart here and there, odd numbers in them, contiguous or not."""
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    want = torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from([1.0, 1e-6, 1e6]))
    moved = torch.randint(0, 3, shape, generator=generator) * draw(st.sampled_from([0.0, 1e-7, 1e-3, 0.5]))
    got = want * (1 + moved)
    if dtype.is_floating_point and want.numel():
        for _ in range(draw(st.integers(0, 3))):
            at, side = draw(st.integers(0, want.numel() - 1)), draw(st.sampled_from(["got", "want", "both"]))
            value = draw(st.sampled_from(SPECIAL))
            for name, tensor in (("got", got), ("want", want)):
                if side in (name, "both"):
                    tensor.view(-1)[at] = value
    got, want = got.to(dtype), want.to(dtype)
    if dtype is torch.int64:
        got, want = got + 2**60, want + 2**60
    if draw(st.booleans()):
        got = got.to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()) and want.dim() > 1:
        got, want = got.transpose(0, -1), want.transpose(0, -1)
    if draw(st.booleans()) and want.dim() and len(want) > 1:
        got, want = got[1:], want[1:]
    return got, want


# The fixture holds for all examples of a test, and is the same for each.
quiet = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)


@quiet
@given(sides())
def test_the_furthest_element_is_that_of_the_whole_in_float64(both: tuple[Tensor, Tensor]) -> None:
    assert same(furthest(*both), whole_furthest(*both))
    assert same(furthest(both[1], both[1]), whole_furthest(both[1], both[1]))


@quiet
@given(sides())
def test_the_scale_is_that_of_the_whole(both: tuple[Tensor, Tensor]) -> None:
    assert scale(both[0]) == whole_scale(both[0])


@quiet
@given(sides(), st.sampled_from([0.5, 3.0, -1.0, 1.0, 0.0]), st.sampled_from([0.0, 1e-9, 1e-2]))
def test_a_ratio_is_that_of_the_whole(both: tuple[Tensor, Tensor], ratio: float, floor: float) -> None:
    exact = Pair(rank=0, got=both[1].double() * ratio, want=both[1])
    for pairs in ([exact], [exact, exact], [Pair(rank=0, got=both[0], want=both[1])]):
        found, expected = constant_ratio(pairs, floor), whole_ratio(pairs, floor)
        if found is None or expected is None:
            # Sums in another order: where a floor is less than float64's own rounding, the last bit decides what fits.
            size = max(whole_scale(pair.got) + whole_scale(pair.want) for pair in pairs)
            assert found is expected or floor <= 1e-12 * size
        else:
            assert found == pytest.approx(expected, rel=1e-12)


@quiet
@given(sides())
def test_the_worst_elements_are_those_of_the_whole(both: tuple[Tensor, Tensor]) -> None:
    got, want = both
    far = torch.nan_to_num(whole_distance(got, want).reshape(-1), nan=float("inf")).sort(descending=True).values
    expected = [value for value in far[:4].tolist() if value != 0]
    shown = worst([Pair(rank=0, got=got, want=want)])
    assert len(shown) == len(expected)
    for sample, value in zip(shown, expected, strict=True):
        at = whole_distance(got[sample.index], want[sample.index])
        assert float(torch.nan_to_num(at, nan=float("inf"))) == value
        assert same(sample.got, float(got[sample.index]))
        assert same(sample.want, float(want[sample.index]))


@given(st.lists(st.integers(0, 9), max_size=4), st.integers(0, 3))
def test_chunks_are_all_elements_once_and_in_order(shape: list[int], turn: int) -> None:
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    tensor = numbers.permute([(dim + turn) % len(shape) for dim in range(len(shape))]) if shape else numbers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "CHUNK_BYTES", 64)
        seen = [(start, piece) for start, (piece,) in chunks(tensor)]
    joined = torch.cat([piece for _, piece in seen]) if seen else torch.empty(0, dtype=torch.long)
    assert joined.tolist() == tensor.reshape(-1).tolist()
    assert [start for start, _ in seen] == list(_starts(seen))


def _starts(seen: list[tuple[int, Tensor]]) -> Iterator[int]:
    at = 0
    for _, piece in seen:
        yield at
        at += piece.numel()


def test_of_differences_that_float32_rounds_alike_one_is_given() -> None:
    """-1 - 2**-30 rounds to -1 in float32: of two chunks with either, the first one's stands for both."""
    want = torch.zeros(64)
    want[[3, 40]] = 1.0
    got = torch.zeros(64)
    got[40] = -(2.0**-30)
    assert 1 <= furthest(got, want) <= 1 + 2.0**-30


def test_a_difference_that_overflows_in_float32_is_known() -> None:
    got, want = torch.full((40,), 3e38), torch.full((40,), -3e38)
    assert furthest(got, want) == 2 * float(torch.tensor(3e38))
    assert judge([Pair(rank=0, got=got, want=want)], 0.0).ratio == -1.0
