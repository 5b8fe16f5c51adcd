"""A stretch of a flattened box, cut into boxes."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from shardproof.checkpoint.portion import Portion, stretch_boxes
from shardproof.parallel.piece import Piece, whole

shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@given(shapes, st.data())
def test_boxes_tile_a_stretch_exactly_and_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    count = math.prod(shape)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    numbered = torch.arange(count).reshape(shape)
    found, at = [], 0
    boxes = list(stretch_boxes(shape, start, stop))
    for offset, size, begin in boxes:
        assert begin == at
        at += math.prod(size)
        found += numbered[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))].flatten().tolist()
    assert found == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(shapes, st.data())
def test_a_portion_reads_and_writes_the_elements_of_its_piece(shape: tuple[int, ...], data: st.DataObject) -> None:
    count = math.prod(shape)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    outer = (*shape[:-1], shape[-1] + 3) if shape else ()
    offset = (*(0 for _ in shape[:-1]), 2) if shape else ()
    canonical = torch.arange(math.prod(outer)).reshape(outer)
    piece = Piece(whole=outer, offset=offset, shape=shape, stretch=(start, stop))
    portion = Portion(piece, torch.full((stop - start,), -1))
    for box in portion.boxes():
        portion.view(box).copy_(canonical[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))])
    assert torch.equal(portion.local, piece.take(canonical))


def test_who_holds_nothing_has_no_box_but_a_tensor_without_elements_is_saved() -> None:
    nothing = Piece(whole=(4, 2), offset=(4, 0), shape=(0, 2))
    assert list(Portion(nothing, torch.zeros(0, 2)).boxes()) == []
    empty = list(Portion(whole((0, 2)), torch.zeros(0, 2)).boxes())
    assert [box.shape for box in empty] == [(0, 2)]
