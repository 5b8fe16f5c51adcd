"""A rank's records, written and read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from shardproof.parallel.piece import Piece
from shardproof.trace.file import TraceFile, save
from shardproof.trace.record import Record

FULL = Record(
    step=2,
    stage="gradient",
    name="blocks.0.fc1.weight",
    part="exp_avg",
    call=3,
    piece=Piece(
        whole=(4, 2),
        offset=(2, 0),
        shape=(2, 2),
        stretch=(1, 3),
        pending=(("sum", (0, 1)), ("avg", (2, 3))),
        declared=False,
    ),
    draws=77,
    weight=0.25,
)
TENSORS = {
    "bfloat16": torch.tensor([1.0, -0.0, float("nan"), float("inf")], dtype=torch.bfloat16),
    "float64": torch.tensor([[1e-300, 2.0]], dtype=torch.float64),
    "float16": torch.ones(3, dtype=torch.float16),
    "empty": torch.empty(0, 3),
    "no dims": torch.tensor(3.5),
    "int64": torch.tensor([2**62, -1]),
    "bool": torch.tensor([True, False]),
    "not contiguous": torch.arange(6.0).reshape(2, 3).t(),
    "a view": torch.arange(6.0)[2:4],
}


def again(path: Path, *entries: tuple[Record, Tensor | None]) -> TraceFile:
    save(path / "trace", entries)
    return TraceFile(path / "trace")


@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_comes_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    found = again(tmp_path, (FULL, TENSORS[kind])).tensor(0)
    assert (found.dtype, found.shape) == (TENSORS[kind].dtype, TENSORS[kind].shape)
    assert torch.equal(found.nan_to_num(7.0), TENSORS[kind].nan_to_num(7.0)) or not found.is_floating_point()
    assert found.tolist() == TENSORS[kind].tolist() or found.isnan().any()


def test_a_record_of_which_nothing_whole_was_made_is_not_found(tmp_path: Path) -> None:
    record = Record(step=0, stage="forward", name="w", unknown=True)
    found = again(tmp_path, (record, None))
    assert found.records == (record,)
    assert found.by_key == {}


def test_a_record_comes_back_with_all_its_fields(tmp_path: Path) -> None:
    plain = Record(step=-1, stage="initial-state", name="w")
    missing = Record(step=0, stage="gradient", name="w", missing=True)
    found = again(tmp_path, (FULL, torch.zeros(2)), (plain, torch.zeros(1)), (missing, None))
    assert found.records == (FULL, plain, missing)
    piece = found.records[0].piece
    assert piece is not None
    assert piece.pending == (("sum", (0, 1)), ("avg", (2, 3)))
    assert piece.stretch == (1, 3)


def test_records_are_found_by_key_in_the_order_in_which_they_were_made(tmp_path: Path) -> None:
    def record(name: str, call: int) -> Record:
        return Record(step=0, stage="forward", name=name, call=call)

    made = [record("a", 0), record("b", 0), record("a", 1)]
    found = again(tmp_path, *((r, torch.tensor(float(i))) for i, r in enumerate(made)))
    assert found.by_key == {(0, "forward", "a", ""): [0, 2], (0, "forward", "b", ""): [1]}


def test_an_empty_trace_is_a_trace(tmp_path: Path) -> None:
    assert again(tmp_path).records == ()


def test_names_of_any_script_and_paths_with_quotes_survive(tmp_path: Path) -> None:
    record = Record(step=0, stage="forward", name="blöcke.注意", part="['logits'][0]")
    assert again(tmp_path, (record, torch.zeros(1))).records == (record,)
