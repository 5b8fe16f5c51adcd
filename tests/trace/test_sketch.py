"""Sketches: they add up over any way to cut a tensor, and tell norms."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from shardproof.parallel.piece import Piece
from shardproof.trace import sketch as module
from shardproof.trace.sketch import norm, sketch

SHAPES = [
    (),
    (1,),
    (7,),
    (1000,),
    (33, 70),
    (5, 300),
    (64, 1),
    (2, 3, 5, 7),
    (4, 6, 100),
    (3, 1, 129),
    (70, 2, 2),
    (0, 5),
]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got: Tensor, want: Tensor, size: float) -> bool:
    """The same up to the order of sums."""
    return bool((got - want).abs().max() <= 1e-13 * max(size, 1.0) * 16)


def whole(shape: tuple[int, ...]) -> Piece:
    return Piece(whole=shape, offset=(0,) * len(shape), shape=shape)


def cut(box: Piece, dim: int, cuts: list[int]) -> list[Piece]:
    """A box cut along a dim at some of its indices, empty pieces included."""
    made = []
    for start, stop in pairwise([0, *sorted(min(at, box.shape[dim]) for at in cuts), box.shape[dim]]):
        offset = tuple(o + start if d == dim else o for d, o in enumerate(box.offset))
        shape = tuple(stop - start if d == dim else s for d, s in enumerate(box.shape))
        made.append(Piece(whole=box.whole, offset=offset, shape=shape))
    return made


def total(pieces: list[Piece], tensor: Tensor) -> Tensor:
    return torch.stack([sketch(piece.take(tensor), piece) for piece in pieces]).sum(0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_number_is_the_sum_of_all_elements_each_under_its_own_sign(shape: tuple[int, ...]) -> None:
    tensor = drawn(*shape)
    one_by_one = torch.zeros(16, 16, dtype=torch.float64)
    for index in list(product(*map(range, shape)))[:: max(tensor.numel() // 300, 1)]:
        alone = torch.zeros(shape, dtype=torch.float64)
        alone[index] = 1.0
        signs = sketch(alone)
        assert set(signs.unique().tolist()) <= {-1.0, 1.0}
        # Of the piece that is this element alone, the same.
        piece = Piece(whole=shape, offset=index, shape=(1,) * len(shape))
        assert torch.equal(sketch(tensor[index].reshape(piece.shape).sign(), piece), signs * tensor[index].sign())
        one_by_one += signs * tensor[index]
    if tensor.numel() <= 300:
        assert close(sketch(tensor), one_by_one, norm(sketch(tensor)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pieces_add_up_to_the_whole_however_it_is_cut(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 4))
    shape = tuple(data.draw(st.lists(st.integers(1, (700, 40, 12, 7)[dims - 1]), min_size=dims, max_size=dims)))
    tensor = drawn(*shape, seed=data.draw(st.integers(0, 3)))
    pieces = [whole(shape)]
    for _ in range(data.draw(st.integers(1, 3))):
        dim = data.draw(st.integers(0, dims - 1))
        cuts = data.draw(st.lists(st.integers(0, shape[dim]), min_size=1, max_size=3))
        pieces = [part for piece in pieces for part in cut(piece, dim, cuts)]
    want = sketch(tensor)
    assert close(total(pieces, tensor), want, norm(want))
    # FSDP1: every box once more flattened, and stretches of that.
    stretches = []
    for piece in pieces:
        size = math.prod(piece.shape)
        ends = sorted(data.draw(st.lists(st.integers(0, size), max_size=3)))
        for stretch in pairwise([0, *ends, size]):
            stretches.append(Piece(whole=shape, offset=piece.offset, shape=piece.shape, stretch=stretch))
    assert close(total(stretches, tensor), want, norm(want))


def dtensor_pieces(shape: tuple[int, ...], degrees: tuple[int, ...], placements: tuple[Shard, ...]) -> list[Piece]:
    """The boxes of all ranks of a mesh, cut one axis after the other as torch cuts."""
    found = []
    for coordinate in product(*map(range, degrees)):
        box = whole(shape)
        order = sorted(range(len(degrees)), key=lambda a: isinstance(placements[a], _StridedShard))
        for axis in order:
            dim = placements[axis].dim
            chunk = -(-box.shape[dim] // degrees[axis])
            box = cut(box, dim, [coordinate[axis] * chunk, (coordinate[axis] + 1) * chunk])[1]
        found.append(box)
    return found


@pytest.mark.parametrize("shape", [(96, 130), (7, 3), (2, 5), (130, 64)], ids=str)
@pytest.mark.parametrize(
    "placements",
    [(Shard(0), Shard(0)), (Shard(0), Shard(1)), (Shard(1), Shard(0)), (_StridedShard(0, split_factor=2), Shard(0))],
    ids=str,
)
def test_nested_shards_of_fsdp_and_tp_add_up_uneven_and_empty_ones_too(
    shape: tuple[int, int], placements: tuple[Shard, ...]
) -> None:
    tensor = drawn(*shape)
    pieces = dtensor_pieces(shape, (4, 2), placements)
    assert close(total(pieces, tensor), sketch(tensor), norm(sketch(tensor)))


@given(st.floats(-9, 9), st.floats(-9, 9))
@settings(max_examples=10, deadline=None)
def test_sketches_are_linear(a: float, b: float) -> None:
    x, y = drawn(40, 70), drawn(40, 70, seed=1)
    assert close(sketch(a * x + b * y), a * sketch(x) + b * sketch(y), 20 * norm(sketch(x)))


def test_partial_sums_add_up_where_their_piece_lies() -> None:
    tensor, first = drawn(12, 80), drawn(6, 80, seed=1)
    lower = Piece(whole=(12, 80), offset=(6, 0), shape=(6, 80), pending=(("sum", (0, 1)),))
    rest = tensor[6:] - first
    upper = Piece(whole=(12, 80), offset=(0, 0), shape=(6, 80))
    summed = sketch(first, lower) + sketch(rest, lower) + sketch(tensor[:6], upper)
    assert close(summed, sketch(tensor), norm(sketch(tensor)))


def test_an_element_in_another_place_shows() -> None:
    tensor = drawn(30, 200)
    for changed in (tensor.flip(0), tensor.flip(1), tensor.roll(1, 0), tensor.roll(1, 1), tensor.roll(100, 1)):
        apart = float((changed - tensor).norm())
        assert norm(sketch(changed) - sketch(tensor)) == pytest.approx(apart, rel=0.3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16])
def test_every_dtype_is_summed_in_float32(dtype: torch.dtype) -> None:
    tensor = (drawn(3000, 90) * 3).to(dtype)
    got = sketch(tensor)
    assert got.dtype == torch.float32
    assert norm(got - sketch(tensor.double())) <= 1e-6 * norm(got)


def test_half_precision_does_not_overflow() -> None:
    tensor = torch.full((512, 512), 60000.0, dtype=torch.float16)
    assert norm(sketch(tensor)) == pytest.approx(60000.0 * 512, rel=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float64_stays_float64(dtype: torch.dtype) -> None:
    assert sketch(torch.ones(3, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("shape", [(), (50,), (20, 300)], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinities_show_in_every_number(shape: tuple[int, ...], value: float) -> None:
    tensor = torch.zeros(shape)
    tensor.reshape(-1)[-1:] = value
    assert not sketch(tensor).isfinite().any()


def test_views_of_any_strides_are_read_as_what_they_show() -> None:
    base = drawn(60, 8, 90)
    for view in (base.transpose(0, 2), base[::2, :, 1::3], base.permute(1, 2, 0), base[:, :1].expand(60, 8, 90)):
        assert torch.allclose(sketch(view), sketch(view.contiguous()), rtol=0, atol=1e-10)
    values = drawn(6, 40)
    pairs = torch.complex(values, values.flip(0))
    assert torch.equal(sketch(pairs), sketch(torch.view_as_real(pairs)))
    assert torch.equal(sketch(pairs.conj()), sketch(torch.view_as_real(pairs.conj().resolve_conj())))
    assert torch.equal(sketch(values.to_sparse()), sketch(values))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [drawn(100, 200), drawn(70, 131), drawn(20_000), drawn(9, 4, 5, 6)]
    before = [sketch(tensor) for tensor in tensors]
    monkeypatch.setattr(module, "CHUNK", {"cpu": 1000})
    for tensor, want in zip(tensors, before, strict=True):
        assert close(sketch(tensor), want, norm(want))


# Samples.

SAMPLES = tuple(f"{number:024x}" for number in range(6))


@pytest.mark.parametrize("shape", [(6,), (6, 10), (6, 5, 70), (6, 5, 200, 3), (6, 4, 8)], ids=str)
def test_parts_of_a_batch_add_up_in_any_order(shape: tuple[int, ...]) -> None:
    batch = drawn(*shape)
    want = sketch(batch, samples=SAMPLES)
    order = [4, 1, 0, 5, 3, 2]
    parts = [order[:1], order[1:4], order[4:]]
    got = sum(sketch(batch[part], samples=[SAMPLES[i] for i in part]) for part in parts)
    assert isinstance(got, Tensor)
    assert close(got, want, norm(want))
    other = sketch(batch, samples=[SAMPLES[i] for i in order])
    assert norm(other - want) > 0.3 * norm(want)


def test_samples_flattened_with_their_tokens_are_the_same() -> None:
    batch = drawn(6, 5, 80)
    want = sketch(batch, samples=SAMPLES)
    assert close(sketch(batch.reshape(30, 80), samples=SAMPLES), want, norm(want))


@pytest.mark.parametrize("shape", [(6, 9, 130), (54, 130)], ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_piece_of_a_batch_counts_where_it_lies(shape: tuple[int, ...], dim: int) -> None:
    batch = drawn(*shape)
    want = sketch(batch, samples=SAMPLES)
    pieces = cut(whole(shape), dim % len(shape), [1, 4, 40])
    got = sum(sketch(piece.take(batch), piece, SAMPLES) for piece in pieces)
    assert isinstance(got, Tensor)
    assert close(got, want, norm(want))


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="a tensor of shape"):
        sketch(torch.zeros(3), Piece(whole=(6,), offset=(0,), shape=(2,)))
    for samples in ((), ("a", "b")):
        with pytest.raises(ValueError, match="do not share out dim 0"):
            sketch(torch.zeros(3, 2), samples=samples)
    with pytest.raises(ValueError, match="do not share out dim 0"):
        sketch(torch.zeros(()), samples=("a",))


# How good the estimates are.

SIZE = 512

DIFFERENCES: dict[str, tuple[Callable[[], Tensor], float]] = {
    "everywhere": (lambda: torch.randn(SIZE, SIZE), 0.05),
    "few elements": (lambda: torch.randn(SIZE, SIZE) * (torch.rand(SIZE, SIZE) < 1e-4), 0.05),
    "one column": (lambda: torch.randn(SIZE, 1) * (torch.arange(SIZE) == 77), 0.05),
    "a vector": (lambda: torch.randn(4096), 0.05),
    "a short vector": (lambda: torch.randn(128), 0.08),
    "one row": (lambda: torch.randn(1, SIZE) * (torch.arange(SIZE) == 77)[:, None], 0.11),
    "rank one": (lambda: torch.randn(SIZE, 1) * torch.randn(1, SIZE), 0.11),
    "the same in every row": (lambda: torch.ones(SIZE, 1) * torch.randn(1, SIZE), 0.11),
    "constant rows": (lambda: torch.randn(SIZE, 1) * torch.ones(1, SIZE), 0.11),
    "rank one, narrow": (lambda: torch.randn(SIZE, 1) * torch.randn(1, 64), 0.19),
}
"""What differs -> how it is drawn, and the error of its estimated norm (rms), as docs/sketches.md states it."""

DRAWS = 100

LUCK = 1 + 4 / math.sqrt(2 * DRAWS)
"""By how much the rms of so many draws may exceed the true one: four standard errors."""


@pytest.mark.parametrize("name", DIFFERENCES)
def test_norms_are_estimated_within_the_stated_error(name: str) -> None:
    make, stated = DIFFERENCES[name]
    errors = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for _ in range(DRAWS):
            tensor = make()
            errors.append(norm(sketch(tensor)) / float(tensor.double().norm()) - 1)
    rms = float(torch.tensor(errors).square().mean().sqrt())
    assert rms <= LUCK * stated
    # Below a third of the norm: seven times in a million.
    assert min(errors) > -2 / 3


def test_one_element_is_told_exactly_and_nothing_is_missed_of_it() -> None:
    tensor = torch.zeros(300, 300, dtype=torch.float64)
    tensor[17, 211] = -3.5
    assert norm(sketch(tensor)) == 3.5


# What it leaves alone.


def test_no_generator_is_touched_and_no_graph_is_kept() -> None:
    tensor = torch.randn(64, 64, requires_grad=True)
    before = torch.random.get_rng_state()
    got = sketch(tensor * 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not got.requires_grad
    assert got.grad_fn is None
    with torch.inference_mode():
        sketch(torch.ones(3))
    assert not sketch(torch.ones(3)).is_inference()


def test_the_precision_that_a_program_asked_for_does_not_matter() -> None:
    tensor = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    want = sketch(tensor.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(sketch(tensor) - want) <= 1e-6 * norm(want)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert norm(sketch(tensor) - want) <= 1e-6 * norm(want)
        assert sketch(torch.tensor([math.nan, 1.0])).isnan().all()
        assert not sketch(torch.tensor([math.inf, 1.0])).isfinite().any()
    finally:
        torch.set_float32_matmul_precision(before)


def test_kept_signs_stay_within_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = module._Kept(2**17)
    monkeypatch.setattr(module, "_KEPT", kept)
    want = [sketch(drawn(size, 64)) for size in range(300, 320)]
    assert kept._bytes == sum(module._size(made) for made in kept._found.values()) <= 2**17
    assert all(torch.equal(sketch(drawn(size, 64)), old) for size, old in zip(range(300, 320), want, strict=True))


def test_the_signs_are_those_of_all_versions() -> None:
    """Sketches are kept in files: whoever changes the signs must change the version of the files."""
    tensor = torch.arange(1, 701, dtype=torch.float64).reshape(5, 140)
    found = sketch(tensor)
    assert (
        found[0, :4].tolist(),
        found[15, 12:].tolist(),
        sketch(tensor, samples=("a", "b", "c", "d", "e"))[3, 3].item(),
    ) == FIRST


FIRST = ([60.0, -212.0, -12.0, -12.0], [4902.0, 1118.0, 3442.0, 2146.0], -9782.0)


@pytest.mark.parametrize("columns", [128, 96, 200])
def test_either_library_multiplies_to_the_same_sketch(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(2 * module.LONG // 96, columns, generator=torch.Generator().manual_seed(0))
    want = sketch(tensor.double())
    for library in (module.ONEDNN, None):
        monkeypatch.setattr(module, "ONEDNN", library)
        for laid_out in (tensor, tensor.t().contiguous().t()):
            assert norm(sketch(laid_out) - want) <= 3 * torch.finfo(torch.float32).eps * tensor.norm()
