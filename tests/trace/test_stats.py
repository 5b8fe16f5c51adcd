"""Statistics of tensors, of their pieces together, and of what a file says they are."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardproof.trace import stats as module
from shardproof.trace.sketch import sketch
from shardproof.trace.stats import Stats, combined, sketch_and_stats, stats_of

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def drawn(*shape: int) -> Tensor:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    return torch.where(tensor.abs() < 0.2, 0.0, tensor)


def one_by_one(tensor: Tensor) -> Stats:
    """The same, element by element."""
    values = [float(value) for value in tensor.reshape(-1).tolist()]
    finite = [value for value in values if math.isfinite(value)]
    return Stats(
        count=len(values),
        zeros=sum(value == 0 for value in values),
        nans=sum(math.isnan(value) for value in values),
        infs=sum(math.isinf(value) for value in values),
        min=min(finite, default=0.0),
        max=max(finite, default=0.0),
        sum=math.fsum(finite),
        square_sum=math.fsum(value * value for value in finite),
        absmax=max(map(abs, finite), default=0.0),
    )


def agree(got: Stats, want: Stats, rel: float) -> None:
    assert replace(got, sum=0.0, square_sum=0.0) == replace(want, sum=0.0, square_sum=0.0)
    assert got.square_sum == pytest.approx(want.square_sum, rel=rel)
    assert got.sum == pytest.approx(want.sum, abs=rel * math.sqrt(want.count * want.square_sum))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (40, 60), (3, 5, 7)], ids=str)
def test_stats_are_those_of_all_elements(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = drawn(*shape).to(dtype)
    agree(stats_of(tensor), one_by_one(tensor), 1e-6 if dtype.itemsize < 8 else 1e-13)


@pytest.mark.parametrize("chunk", [1, 7, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nan_and_infinities_are_counted_and_the_rest_summed(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", {"cpu": chunk})
    tensor = drawn(30)
    tensor[3], tensor[4], tensor[11], tensor[29] = math.nan, math.inf, -math.inf, math.nan
    got = stats_of(tensor.to(dtype))
    assert (got.nans, got.infs, got.finite) == (2, 2, 26)
    agree(got, one_by_one(tensor.to(dtype)), 1e-6)
    nothing = stats_of(tensor[3:5].to(dtype))
    assert nothing == Stats(count=2, nans=1, infs=1)


def test_squares_that_leave_the_range_of_float32_are_right() -> None:
    for size in (1e30, 1e-30):
        got = stats_of(torch.full((100,), size))
        assert got.square_sum == pytest.approx(100 * size**2, rel=1e-6)
        assert got.norm == pytest.approx(10 * size, rel=1e-6)
    assert stats_of(torch.full((1000,), 60000.0, dtype=torch.float16)).sum == 1000 * 60000.0


def test_the_other_device_path_says_the_same() -> None:
    tensor = drawn(50, 70)
    tensor[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    for dtype in DTYPES:
        kept = (
            tensor.nan_to_num().clamp(-100, 100).to(dtype)
            if dtype.itemsize == 8 or not dtype.is_floating_point
            else tensor.to(dtype)
        )
        agree(module._elsewhere(kept), stats_of(kept), 1e-5)
    assert module._elsewhere(torch.zeros(0)) == Stats()


def test_sums_of_many_float32_are_as_right_as_stated() -> None:
    tensor = torch.rand(3_000_000, generator=torch.Generator().manual_seed(0))
    got = stats_of(tensor)
    assert got.sum == pytest.approx(float(tensor.double().sum()), rel=1e-6)
    assert got.square_sum == pytest.approx(float(tensor.double().square().sum()), rel=1e-5)


def test_views_count_each_element_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", {"cpu": 100})
    base = drawn(20, 6, 30)
    for view in (
        base.t() if base.dim() == 2 else base.transpose(0, 2),
        base[::2, :, 1::3],
        base[:, :1].expand(20, 6, 30),
    ):
        agree(stats_of(view), one_by_one(view), 1e-12)
    pairs = torch.complex(base, base.flip(0))
    assert stats_of(pairs).count == 2 * base.numel()
    assert stats_of(pairs.conj()).min == float(torch.view_as_real(pairs.conj().resolve_conj()).min())
    assert stats_of(drawn(5, 6).to_sparse()) == stats_of(drawn(5, 6))


@given(st.lists(st.integers(0, 200), max_size=4), st.booleans())
@settings(max_examples=30, deadline=None)
def test_pieces_combine_to_the_whole(cuts: list[int], broken: bool) -> None:
    tensor = drawn(200)
    if broken:
        tensor[:40] = math.nan
    parts = torch.tensor_split(tensor, sorted(cuts))
    agree(combined(stats_of(part) for part in parts), stats_of(tensor), 1e-12)


@pytest.mark.parametrize(
    "tensor",
    [drawn(9), torch.tensor([math.nan]), torch.zeros(3), torch.full((2,), 1e300, dtype=torch.float64)],
    ids=str,
)
def test_stats_come_back_from_a_file(tensor: Tensor) -> None:
    found = stats_of(tensor)
    assert Stats.from_dict(json.loads(json.dumps(found.to_dict()))) == found


RIGHT = Stats(count=5, zeros=1, nans=1, infs=1, min=-2.0, max=1.0, sum=-1.0, square_sum=5.0, absmax=2.0).to_dict()


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        "count",
        {},
        {**RIGHT, "more": 1},
        {key: value for key, value in RIGHT.items() if key != "nans"},
        {**RIGHT, "count": -1},
        {**RIGHT, "count": 5.0},
        {**RIGHT, "count": True},
        {**RIGHT, "count": 2**70},
        {**RIGHT, "count": 2},
        {**RIGHT, "zeros": 4},
        {**RIGHT, "zeros": 3},
        {**RIGHT, "min": "0"},
        {**RIGHT, "min": None},
        {**RIGHT, "min": math.nan},
        {**RIGHT, "max": math.inf, "absmax": math.inf},
        {**RIGHT, "max": -3.0},
        {**RIGHT, "absmax": 1.0},
        {**RIGHT, "square_sum": -1.0},
        {**RIGHT, "square_sum": math.nan},
        {**RIGHT, "square_sum": 3.0},
        {**RIGHT, "sum": 10**400},
        {**RIGHT, "sum": 1e9},
        {**RIGHT, "sum": [1.0]},
        {**RIGHT, "count": 2, "zeros": 0},
    ],
    ids=lambda plain: str(plain)[:60],
)
def test_what_no_tensor_can_have_is_refused(wrong: object) -> None:
    assert Stats.from_dict(RIGHT)
    with pytest.raises(ValueError, match=r"stats|count|number|finite|float64"):
        Stats.from_dict(wrong)


@pytest.mark.parametrize("size", [module.SHORT - 1, module.SHORT, 3 * module.SHORT + 517])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_long_rows_and_what_is_left_of_them_are_summed(size: int, dtype: torch.dtype) -> None:
    tensor = drawn(size).to(dtype)
    agree(stats_of(tensor), one_by_one(tensor), 1e-6 if dtype == torch.float32 else 1e-13)
    assert stats_of(torch.zeros(size, dtype=dtype)).zeros == size
    assert stats_of(tensor.sign().masked_fill(tensor == 0, -1)).zeros == 0


def test_a_million_equal_squares_add_up() -> None:
    got = stats_of(torch.full((2**20,), 0.1))
    assert got.square_sum == pytest.approx(2**20 * float(torch.tensor(0.1)) ** 2, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (6, 4), (64, 96), (3, 50, 48), (1000,)])
@pytest.mark.parametrize("by_sample", [False, True])
def test_one_pass_gives_the_sketch_and_the_stats(
    dtype: torch.dtype, shape: tuple[int, ...], by_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where in ("sketch", "stats"):
        monkeypatch.setattr(f"shardproof.trace.{where}.CHUNK", {"cpu": 2**10})
    samples = [f"{n:024x}" for n in range(shape[0])] if by_sample and shape and shape[0] else None
    tensor = (torch.randn(shape) * 9).to(dtype)
    strided = tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
    for way in (tensor, strided):
        rows, stats = sketch_and_stats(way, None, samples)
        assert torch.equal(rows, sketch(way, None, samples))
        # Chunks may end elsewhere, where short dims are taken together.
        alone = stats_of(way)
        assert stats.sum == pytest.approx(alone.sum, rel=1e-5, abs=1e-3)
        assert stats.square_sum == pytest.approx(alone.square_sum, rel=1e-5)
        assert replace(stats, sum=alone.sum, square_sum=alone.square_sum) == alone
