"""Which elements of a whole a rank holds, against the chunks that torch itself makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shardproof.parallel import mesh as meshes
from shardproof.parallel import piece
from shardproof.parallel.piece import Piece
from shardproof.ranks import Place, Ranks, start
from shardproof.spec.parallelism import Parallelism

LAYOUT = Parallelism(dp_shard=2, tp=2)


def numbered(*shape: int) -> Tensor:
    """Every element says its own place."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


@dataclass(frozen=True)
class OnRanks:
    """What torch holds, and what the piece says that it holds, on every rank."""

    def placed(self, place: Place, shape: tuple[int, ...], placements: Sequence[object]) -> tuple[Piece, list[float]]:
        with place.world("placed", 4):
            mesh, _ = meshes.build(LAYOUT, "cpu")
            tensor = distribute_tensor(numbered(*shape), mesh["dp_shard", "tp"], placements)
            return piece.of_tensor(tensor), _agreed(tensor, numbered(*shape))

    def strided(self, place: Place, rows: int, columns: int, style: str) -> tuple[Piece, list[float]]:
        """Tensor parallelism first, fully_shard over the same dim second: torch's strided shard."""
        with place.world("strided", 4):
            mesh, _ = meshes.build(LAYOUT, "cpu")
            linear = nn.Linear(columns, rows, bias=False, dtype=torch.float64)
            whole = numbered(rows, columns)
            linear.weight = nn.Parameter(whole.clone())
            parallelize_module(linear, mesh["tp"], ColwiseParallel() if style == "colwise" else RowwiseParallel())
            fully_shard(linear, mesh=mesh["dp_shard"])
            return piece.of_tensor(linear.weight), _agreed(linear.weight, whole)

    def partial(self, place: Place) -> tuple[Piece, list[float]]:
        with place.world("partial", 4):
            mesh, _ = meshes.build(LAYOUT, "cpu")
            local = numbered(2, 3)
            tensor = DTensor.from_local(local, mesh["dp_shard", "tp"], (Shard(0), Partial()), run_check=False)
            return piece.of_tensor(tensor), []


def _agreed(tensor: DTensor, whole: Tensor) -> list[float]:
    """The elements that this rank holds. Raises where the piece would take others."""
    local, found = tensor._local_tensor.detach(), piece.of_tensor(tensor)
    torch.testing.assert_close(found.take(whole), local, rtol=0, atol=0)
    for index in product(*map(range, local.shape)):
        if whole[found.index(index)] != local[index]:
            raise ValueError(f"element {index} is said to be {found.index(index)}")
    return local.flatten().tolist()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(4, OnRanks()) as ranks:
        yield ranks


SHAPES = [(8, 4), (7, 3), (2, 5), (1, 1), (3,), (5, 1, 6)]
PLACEMENTS = {
    "both on one dim": (Shard(0), Shard(0)),
    "one dim": (Replicate(), Shard(0)),
    "the other": (Shard(0), Replicate()),
    "nowhere": (Replicate(), Replicate()),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_piece_takes_what_torch_holds_uneven_and_empty_chunks_too(
    ranks: Ranks, name: str, shape: tuple[int, ...]
) -> None:
    found = ranks.call("placed", shape, PLACEMENTS[name])
    held = [sorted(values) for _, values in found.values()]
    everything = numbered(*shape).flatten().tolist()
    if name == "both on one dim":
        assert sorted(chain.from_iterable(held)) == everything
    elif name == "nowhere":
        assert held == [everything] * 4
    else:
        assert sorted(chain.from_iterable(held)) == sorted(2 * everything)
    assert all(found[rank][0].declared for rank in found)


@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (1, 2)], ids=str)
def test_two_axes_may_cut_two_dims(ranks: Ranks, shape: tuple[int, int]) -> None:
    found = ranks.call("placed", shape, (Shard(1), Shard(0)))
    assert sorted(value for _, values in found.values() for value in values) == numbered(*shape).flatten().tolist()


@pytest.mark.parametrize("style", ["colwise", "rowwise"])
@pytest.mark.parametrize(("rows", "columns"), [(8, 4), (7, 3), (5, 6), (2, 2), (1, 3)])
def test_a_strided_shard_cuts_what_tp_has_already_cut(ranks: Ranks, style: str, rows: int, columns: int) -> None:
    found = ranks.call("strided", rows, columns, style)
    values = sorted(value for _, values in found.values() for value in values)
    assert values == numbered(rows, columns).flatten().tolist()
    if (rows, columns, style) == (8, 4, "colwise"):
        # Rank 1 is dp_shard 0, tp 1: the first half of the second half.
        assert found[1][0].offset == (4, 0)
        assert found[2][0].offset == (2, 0)


def test_a_partial_sum_names_the_ranks_that_have_to_be_added(ranks: Ranks) -> None:
    found = {rank: piece for rank, (piece, _) in ranks.call("partial").items()}
    assert [found[rank].pending for rank in range(4)] == [
        ((("sum", group)),) for group in ((0, 1), (0, 1), (2, 3), (2, 3))
    ]
    assert [found[rank].offset for rank in range(4)] == [(0, 0), (0, 0), (2, 0), (2, 0)]


def test_a_plain_tensor_is_taken_for_the_whole_and_says_so() -> None:
    found = piece.of_tensor(torch.zeros(2, 3))
    assert (found.whole, found.shape, found.offset, found.declared) == ((2, 3), (2, 3), (0, 0), False)


def test_a_plain_tensor_of_another_shape_is_a_part_that_only_values_can_place() -> None:
    found = piece.of_tensor(torch.zeros(1, 3), (2, 3))
    assert (found.whole, found.shape, found.declared) == ((2, 3), (1, 3), False)


BOXES = st.integers(1, 3).flatmap(
    lambda dims: st.lists(
        st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(0, 4)), min_size=dims, max_size=dims
    )
)


@given(BOXES, st.data())
def test_take_and_index_agree_on_every_element(box: list[tuple[int, int, int]], data: st.DataObject) -> None:
    whole = numbered(*(size for size, _, _ in box))
    offset = tuple(min(start, size) for size, start, _ in box)
    shape = tuple(min(length, size - start) for (size, _, length), start in zip(box, offset, strict=True))
    count = torch.Size(shape).numel()
    stretch = None
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, count))
        stretch = (start, data.draw(st.integers(start, count)))
    made = Piece(whole=tuple(whole.shape), offset=offset, shape=shape, stretch=stretch)
    taken = made.take(whole)
    assert tuple(taken.shape) == made.local_shape
    for index in product(*map(range, taken.shape)):
        assert whole[made.index(index)] == taken[index]
