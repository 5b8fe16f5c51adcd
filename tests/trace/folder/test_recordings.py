"""What was written is read again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import entries
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from shardproof import TraceError, UsageError
from shardproof.parallel import mesh as meshes
from shardproof.parallel import piece
from shardproof.parallel.piece import Piece
from shardproof.ranks import Place, Ranks, start
from shardproof.spec.parallelism import Parallelism
from shardproof.trace.checksums import same_bits
from shardproof.trace.folder import safetensors_file, writer
from shardproof.trace.folder.mapped import Pages
from shardproof.trace.folder.reader import RankTrace, open_recording
from shardproof.trace.folder.writer import Writer
from shardproof.trace.record import Record
from shardproof.trace.sketch import sketch
from shardproof.trace.stats import stats_of

TENSORS = {
    "float64": torch.tensor([[1e-300, -0.0]], dtype=torch.float64),
    "bfloat16": torch.tensor([1.0, -0.0, float("nan"), float("inf")], dtype=torch.bfloat16),
    "float16": torch.ones(3, dtype=torch.float16),
    "float8_e4m3fn": torch.tensor([0.5, 448.0, -2.0]).to(torch.float8_e4m3fn),
    "float8_e5m2": torch.tensor([0.5, float("inf")]).to(torch.float8_e5m2),
    "float8_e4m3fnuz": torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fnuz),
    "int64": torch.tensor([2**62, -1]),
    "int8": torch.tensor([[-128, 127]], dtype=torch.int8),
    "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
    "bool": torch.tensor([True, False, True]),
    "no dims": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    "not contiguous": torch.arange(6.0).reshape(2, 3).t(),
    "a view": torch.arange(6.0)[2:4],
    "requires a gradient": torch.ones(2, requires_grad=True),
    "complex64": torch.tensor([1 + 2j, 3 - 1j]),
    "conjugated": torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128).conj(),
    "a negative view": torch.tensor([1 + 2j]).conj().imag,
    "sparse": torch.eye(3).to_sparse(),
}


def as_kept(tensor: Tensor) -> Tensor:
    """Dense, complex as pairs of reals, contiguous."""
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach().resolve_conj().resolve_neg()
    # A clone, as `same_bits` takes no single element with a stride.
    return (torch.view_as_real(dense) if dense.is_complex() else dense).clone(memory_format=torch.contiguous_format)


def record(name: str, step: int = 0, **fields: object) -> Record:
    return Record(step=step, stage="forward", name=name, **fields)


@pytest.fixture
def all_kinds(tmp_path: Path) -> Path:
    made = Writer(tmp_path, 0, 1, {})
    for number, (name, tensor) in enumerate(TENSORS.items()):
        made.write(record(name), tensor, depth="full")
        if number == 5:
            made.flush()
    made.close()
    return tmp_path


def trace(folder: Path, rank: int = 0) -> RankTrace:
    recording = open_recording(folder)
    assert recording.problems == ()
    return recording.ranks[rank]


def test_every_kind_of_tensor_comes_back_bit_for_bit(all_kinds: Path) -> None:
    found = trace(all_kinds)
    assert [kept.name for kept in found.records] == list(TENSORS)
    for number, tensor in enumerate(TENSORS.values()):
        assert same_bits(found.tensor(number), as_kept(tensor))
        assert found.shape(number) == tuple(as_kept(tensor).shape)
        assert found.dtype(number) == as_kept(tensor).dtype


def test_the_finished_file_opens_with_plain_safetensors(all_kinds: Path) -> None:
    with safe_open(all_kinds / "rank-00000.safetensors", "pt") as file:
        names = {re.sub(r"^\d+ forward ", "", name): name for name in file.keys() if "padding" not in name}  # noqa: SIM118
        assert names.keys() == TENSORS.keys()
        for kind, tensor in TENSORS.items():
            found = file.get_tensor(names[kind])
            if kind == "float8_e4m3fnuz":
                found = found.view(torch.float8_e4m3fnuz)  # younger than the format: raw bytes to other readers
            assert same_bits(found, as_kept(tensor)), kind


def test_records_events_and_header_come_back_whole(recorded: Callable[..., Path]) -> None:
    recording = open_recording(recorded(2))
    assert (recording.world_size, recording.missing, recording.problems, recording.complete) == (2, (), (), True)
    for rank, found in recording.ranks.items():
        assert list(found.records) == [made for made, _, _ in entries(rank)]
        assert [found.depth(n) for n in range(8)] == ["full", "full", "sketch", None, "full", "stats", None, "full"]
        assert [event["event"] for event in found.events] == ["layout", "step", "closed"]
        assert found.events[0]["axes"] == {"tp": 2}
        assert (found.header["what"], found.header["rank"], found.complete) == ("full", rank, True)


def test_records_are_found_by_key_without_those_of_which_nothing_whole_was_made(recorded: Callable[..., Path]) -> None:
    found = trace(recorded())
    assert found.by_key[(0, "gradient", "fc1.weight", "")] == [3]
    assert (0, "buffer", "blöcke.注意", "") not in found.by_key


def test_sketches_and_statistics_are_those_of_the_tensor(tmp_path: Path) -> None:
    tensor = torch.randn(6, 4)
    made = Writer(tmp_path, 0, 1, {})
    made.write(record("a"), tensor, depth="sketch")
    made.write(record("b"), tensor, depth="sketch", samples=[f"{n:024x}" for n in range(6)])
    made.write(record("c"), tensor, depth="stats")
    made.close()
    found = trace(tmp_path)
    assert torch.equal(found.sketch(0), sketch(tensor, None))
    assert [found.keyed(n) for n in range(3)] == ["index", "samples", None]
    assert found.stats(0) == found.stats(2) == stats_of(tensor)
    assert (found.shape(2), found.dtype(2)) == ((6, 4), torch.float32)
    with pytest.raises(TraceError, match=r"no values of step 0, forward, a: .* depth sketch; record with depth full"):
        found.tensor(0)
    with pytest.raises(TraceError, match="no sketch of step 0, forward, c"):
        found.sketch(2)


def test_a_complex_piece_and_its_tensor_get_the_same_last_dim(tmp_path: Path) -> None:
    made = Writer(tmp_path, 0, 1, {})
    where = Piece(whole=(4,), offset=(2,), shape=(2,))
    made.write(record("w", piece=where), torch.tensor([1j, 2.0]), depth="full")
    made.close()
    assert trace(tmp_path).records[0].piece == where.as_real()


def test_what_cannot_be_kept_is_unknown_and_never_a_wrong_tensor(tmp_path: Path) -> None:
    made = Writer(tmp_path, 0, 1, {})
    made.write(record("meta"), torch.empty(2, device="meta"), depth="full")
    made.write(record("misplaced", piece=replace(piece.whole((3,)), declared=True)), torch.zeros(2), depth="full")
    made.write(record("outside", piece=Piece(whole=(3,), offset=(2,), shape=(2,))), torch.zeros(2), depth="full")
    made.close()
    found = trace(tmp_path)
    assert [kept.unknown for kept in found.records] == [True, True, True]
    assert found.by_key == {}


def test_a_plain_tensor_larger_than_its_model_says_is_kept_as_it_is(tmp_path: Path) -> None:
    made = Writer(tmp_path, 0, 1, {})
    assumed = Piece(whole=(3,), offset=(0,), shape=(4,), declared=False)
    made.write(record("padded", piece=assumed), torch.ones(4), depth="full")
    made.close()
    found = trace(tmp_path)
    assert found.records[0].piece == piece.whole((4,))
    assert torch.equal(found.tensor(0), torch.ones(4))


def test_a_full_header_begins_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "HEADER_BYTES", 4096)
    made = Writer(tmp_path, 0, 1, {})
    tensors = [torch.full((n,), float(n)) for n in range(100)]
    for number, tensor in enumerate(tensors):
        made.write(record(f"m{number}"), tensor, depth="full")
    made.close()
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "rank-00000-1.safetensors",
        "rank-00000.safetensors",
    ]
    found = trace(tmp_path)
    assert all(torch.equal(found.tensor(n), tensor) for n, tensor in enumerate(tensors))
    kept = []
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            kept += [name for name in file.keys() if "padding" not in name]  # noqa: SIM118
    assert len(kept) == 100


def test_two_runs_that_do_the_same_write_the_same_index(recorded: Callable[..., Path], tmp_path: Path) -> None:
    first, second = (recorded(2, tmp_path / name) / "rank-00000.jsonl" for name in "ab")
    assert first.read_text() == second.read_text()
    line = json.loads(first.read_text().splitlines()[2])
    assert list(line) == ["step", "stage", "name", "piece", "depth", "shape", "dtype", "file", "at", "bytes"]


def test_a_running_recording_is_readable_up_to_its_last_flush(tmp_path: Path) -> None:
    made = Writer(tmp_path, 0, 1, {})
    made.write(record("a"), torch.ones(3), depth="full")
    made.flush()
    found = open_recording(tmp_path)
    assert len(found.ranks[0].records) == 1
    assert not found.complete
    assert found.problems == (
        "rank 0: there is no closing line: the run was cut off, or still goes on; 1 record is read",
    )
    with safe_open(tmp_path / "rank-00000.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("0 forward a"), torch.ones(3))
    made.close()


def test_lines_do_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Writer(tmp_path, 0, 1, {})
    for number in range(writer.FLUSH_RECORDS):
        made.write(record(f"m{number}"), torch.ones(1), depth="full")
    assert len(open_recording(tmp_path).ranks[0].records) == writer.FLUSH_RECORDS
    monkeypatch.setattr(writer, "FLUSH_S", 0.0)
    made.write(record("late"), None, depth="full")
    assert len(open_recording(tmp_path).ranks[0].records) == writer.FLUSH_RECORDS + 1
    made.close()


def test_a_folder_that_holds_the_rank_already_is_left_alone(recorded: Callable[..., Path]) -> None:
    folder = recorded(2)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match=r"run holds a recording of rank 1 already .*another directory, or overwrite"):
        Writer(folder, 1, 2, {})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_overwriting_leaves_nothing_of_the_run_before(recorded: Callable[..., Path]) -> None:
    folder = recorded(3)
    (folder / "notes.txt").write_text("mine")
    for rank in (0, 1):
        Writer(folder, rank, 2, {}, overwrite=True).close()
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "rank-00000.jsonl", "rank-00001.jsonl"]
    assert open_recording(folder).complete


def test_a_full_disk_is_one_error_and_what_was_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Writer(tmp_path, 0, 1, {})
    for number in range(3):
        made.write(record(f"m{number}"), torch.full((300,), float(number)), depth="full")
    real = os.pwrite

    def full(descriptor: int, content: memoryview, at: int) -> int:
        if len(content) > 500:
            real(descriptor, content[:100], at)
            raise OSError(28, "No space left on device")
        return real(descriptor, content, at)

    monkeypatch.setattr(safetensors_file.os, "pwrite", full)
    with pytest.raises(TraceError, match=re.escape(f"{tmp_path}: rank 0 could not write 1200 bytes")) as error:
        made.write(record("m3"), torch.ones(300), depth="full")
    assert "No space left" in str(error.value)
    assert "3 records" in str(error.value)
    monkeypatch.undo()
    # The one error is enough: what comes after it, on the way out, is silent.
    made.write(record("m4"), torch.ones(300), depth="full")
    made.event("step", step=0)
    made.close()
    found = open_recording(tmp_path)
    assert [kept.name for kept in found.ranks[0].records] == ["m0", "m1", "m2"]
    assert torch.equal(found.ranks[0].tensor(2), torch.full((300,), 2.0))
    assert not found.complete
    with safe_open(tmp_path / "rank-00000.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("1 forward m1"), torch.ones(300))


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match="could not write"):
        Writer(tmp_path / "file" / "run", 0, 1, {})


def test_facts_that_are_no_plain_data_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"about: .*object.* has no place in a recording"):
        Writer(tmp_path, 0, 1, {"model": object()})
    deep: list[object] = []
    for _ in range(40):
        deep = [deep]
    with pytest.raises(UsageError, match="about: it is nested more than"):
        Writer(tmp_path, 0, 1, {"deep": deep})
    with pytest.raises(UsageError, match="about holds rank"):
        Writer(tmp_path, 0, 1, {"rank": 3})
    assert list(tmp_path.iterdir()) == []


def test_pages_are_given_back_and_tensors_that_are_held_stay_right(tmp_path: Path) -> None:
    made = Writer(tmp_path, 0, 1, {})
    size = 2**20
    for number in range(8):
        made.write(record(f"m{number}"), torch.full((size,), float(number)), depth="full")
    made.close()
    pages = Pages(touched_bytes=2 * 4 * size)
    found = RankTrace(tmp_path, 0, pages)
    held = [found.tensor(number) for number in range(8)]
    assert [float(tensor.sum()) for tensor in held] == [float(number * size) for number in range(8)]
    pages.give_back()
    before = resident_bytes()
    assert float(held[5].sum()) == 5.0 * size
    assert resident_bytes() - before > 3 * size
    pages.give_back()
    assert resident_bytes() - before < size


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class OnRanks:
    def write(self, place: Place, folder: str) -> None:
        """The whole tensor is the numbers from 0; each rank records its shard of five rows."""
        with place.world("write", 2):
            mesh, _ = meshes.build(Parallelism(dp_shard=2), "cpu")
            whole = torch.arange(10.0).reshape(5, 2)
            sharded = distribute_tensor(whole, mesh["dp_shard"], [Shard(0)])
            made = Writer(Path(folder), place.rank, 2, {})
            made.write(record("w", piece=piece.of_tensor(sharded)), sharded, depth="full")
            made.close()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(2, OnRanks()) as started:
        yield started


def test_of_a_dtensor_the_local_part_is_kept(ranks: Ranks, tmp_path: Path) -> None:
    ranks.call("write", str(tmp_path))
    recording = open_recording(tmp_path)
    whole = torch.arange(10.0).reshape(5, 2)
    for found in recording.ranks.values():
        where = found.records[0].piece
        assert where is not None
        assert torch.equal(found.tensor(0), where.take(whole))
    assert [found.shape(0) for found in recording.ranks.values()] == [(3, 2), (2, 2)]
