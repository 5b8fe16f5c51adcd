"""A recording that is cut off, damaged, or made up: a clear error or a part of it, and nothing else."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import entries
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shardproof import TraceError
from shardproof.trace.checksums import same_bits
from shardproof.trace.folder.reader import Recording, open_recording
from shardproof.trace.folder.writer import Writer
from shardproof.trace.record import Record

INDEX, DATA = "rank-00000.jsonl", "rank-00000.safetensors"
FUZZ = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def folder(recorded: Callable[..., Path]) -> Path:
    return recorded(2)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / INDEX).read_text().splitlines()]


def put(folder: Path, lines: list[Any]) -> None:
    # Without blanks, as the writer does it.
    (folder / INDEX).write_text("".join(f"{json.dumps(line, separators=(chr(44), chr(58)))}\n" for line in lines))


def looked_at(folder: Path) -> Recording | None:
    """All that a recording gives away, or None where it says that it cannot be read."""
    try:
        recording = open_recording(folder)
    except TraceError:
        return None
    assert all(isinstance(problem, str) and problem.isprintable() for problem in recording.problems)
    for trace in recording.ranks.values():
        assert trace.complete == (not trace.problems)
        for number, record in enumerate(trace.records):
            depth = trace.depth(number)
            if depth == "full":
                assert tuple(trace.tensor(number).shape) == trace.shape(number)
                if record.piece is not None:
                    assert record.piece.local_shape == trace.shape(number)
            elif depth is not None:
                with suppress(TraceError):  # numbers that no tensor has
                    trace.stats(number)
                assert depth == "stats" or trace.sketch(number).shape == (16, 16)
        assert all(trace.records[number].key == key for key, found in trace.by_key.items() for number in found)
    return recording


def right_as_far_as_it_goes(recording: Recording) -> int:
    """How many records there are, each of them right."""
    trace = recording.ranks[0]
    want = entries(0)
    for number, record in enumerate(trace.records):
        assert record == want[number][0]
        if trace.depth(number) == "full":
            tensor = want[number][1]
            assert tensor is not None
            assert same_bits(trace.tensor(number), tensor)
    return len(trace.records)


def test_an_index_cut_off_at_any_byte_is_read_up_to_its_last_whole_line(folder: Path) -> None:
    path = folder / INDEX
    content = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(content) if byte == ord("\n")]
    near = {end + by for end in ends for by in (-2, -1, 0, 1, 2) if end + by < len(content)}
    for cut in sorted({0, *near, *random.Random(0).sample(range(len(content)), 300)}):
        path.write_bytes(content[:cut])
        recording = looked_at(folder)
        assert recording is not None
        if cut < ends[0]:
            assert recording.missing == (0,)
            assert any(problem.startswith("rank 0: rank-00000.jsonl cannot be read") for problem in recording.problems)
            continue
        whole = [json.loads(line) for line in content[:cut].splitlines(keepends=True) if line.endswith(b"\n")]
        number = right_as_far_as_it_goes(recording)
        assert number == sum("stage" in line for line in whole)
        (problem,) = recording.problems
        if cut not in ends:
            assert f"line {len(whole) + 1} is not whole: the run was cut off; {number} record" in problem


def test_data_cut_off_at_any_byte_end_the_records_whose_data_are_gone(folder: Path) -> None:
    path = folder / DATA
    content = path.read_bytes()
    places = [line.get("sketch", line) for line in lines_of(folder)]
    stops = [place["at"] + place["bytes"] if "at" in place else 0 for place in places]
    kinds = ["stage" in line for line in lines_of(folder)]
    cuts = random.Random(0).sample(range(len(content)), 200)
    for cut in [*cuts, *(stop for stop in stops if stop), *(stop - 1 for stop in stops if stop)]:
        path.write_bytes(content[:cut])
        recording = looked_at(folder)
        assert recording is not None
        bad = next((at for at, stop in enumerate(stops) if stop > cut), None)
        assert right_as_far_as_it_goes(recording) == sum(kinds[:bad])
        assert recording.complete == (bad is None)
        if bad is not None:
            assert f"line {bad + 1} is not valid: its data are not whole" in recording.problems[0]


@FUZZ
@given(st.data())
def test_flipped_bytes_of_an_index_give_an_error_or_valid_records(folder: Path, data: st.DataObject) -> None:
    path = folder / INDEX
    content = path.read_bytes()
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
    looked_at(folder)
    path.write_bytes(content)


@FUZZ
@given(st.integers(0, 2**17 + 200), st.integers(1, 255))
@example(0, 1)
def test_a_flipped_byte_of_the_data_changes_no_more_than_that_value(folder: Path, at: int, flip: int) -> None:
    path = folder / DATA
    content = path.read_bytes()
    at = min(at, len(content) - 1)
    path.write_bytes(content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :])
    recording = looked_at(folder)
    assert recording is not None
    assert recording.complete  # nothing goes by the header of the data, and data have no checksum
    trace = recording.ranks[0]
    places = [line for line in lines_of(folder) if "stage" in line]
    for number, (place, (_, tensor, depth)) in enumerate(zip(places, entries(0), strict=True)):
        if depth == "full" and tensor is not None and not place["at"] <= at < place["at"] + place["bytes"]:
            assert same_bits(trace.tensor(number), tensor)
    path.write_bytes(content)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["nan", "inf", "../../etc/passwd", "\x1b[31m", "\ud800", 1e308, 2**53, -1, 2**63, 10**4000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@FUZZ
@given(st.data())
def test_a_changed_value_anywhere_gives_an_error_or_valid_records(folder: Path, data: st.DataObject) -> None:
    lines = lines_of(folder)
    content = (folder / INDEX).read_bytes()
    target: Any = lines
    while True:
        key = data.draw(st.sampled_from(sorted(target) if isinstance(target, dict) else range(len(target))))
        if not isinstance(target[key], dict | list) or not target[key] or data.draw(st.booleans()):
            break
        target = target[key]
    if isinstance(target, dict) and data.draw(st.booleans()):
        value = target.pop(key)
        if data.draw(st.booleans()):
            target[data.draw(st.text(max_size=8))] = value
    else:
        target[key] = data.draw(JUNK)
    put(folder, lines)
    looked_at(folder)
    (folder / INDEX).write_bytes(content)


def changed(number: int, **fields: Any) -> Callable[[list[Any]], None]:
    def change(lines: list[Any]) -> None:
        lines[number] |= fields

    return change


FULL = 2
"""Line of the first record with values, from 0."""

BAD = {
    "a negative offset": (changed(FULL, at=-64), r'"at" is -64'),
    "an offset that is not the next": (changed(3, at=64), r'"at" is 64; the next tensor starts at'),
    "more bytes than there are": (changed(FULL, at=2**30), "its data are not whole"),
    "a shape of other bytes": (changed(FULL, shape=[40, 3]), '"shape" is .40, 3., and that of its piece .4, 3.'),
    "bytes of another shape": (changed(FULL, bytes=12), '"bytes" is 12; its shape and dtype take 48'),
    "a huge shape": (changed(3, shape=[2**40, 2**40]), "no tensor is that large"),
    "a file elsewhere": (changed(FULL, file="../x"), "\"file\" is '../x', not a whole number"),
    "a file far away": (changed(FULL, file=7), '"file" is 7 after file 0'),
    "true for 1": (changed(4, call=True), '"call" is True'),
    "a float for a whole number": (changed(FULL, step=0.0), '"step" is 0.0'),
    "a step before the first": (changed(FULL, step=-2), '"step" is -2'),
    "no such stage": (changed(FULL, stage="end"), "\"stage\" is 'end', not the name of a stage"),
    "no name": (changed(FULL, name=""), '"name" is'),
    "a name that is no text": (changed(FULL, name=["a"]), "\"name\" is .'a'."),
    "a long name": (changed(FULL, name="a" * 20_000), '"name" has 20000 characters'),
    "half a character": (changed(FULL, name="\ud800"), "half a character"),
    "a dtype of another world": (changed(FULL, dtype="object"), "\"dtype\" is 'object'"),
    "a depth of another world": (changed(FULL, depth="some"), "\"depth\" is 'some'"),
    "a field of another world": (changed(FULL, pickle="gASV"), "'pickle' is no field of a record"),
    "a piece outside": (
        changed(FULL, piece={"whole": [4, 3], "offset": [2, 0], "shape": [4, 3]}),
        "does not lie in a whole of .4, 3.",
    ),
    "a piece of mixed dims": (changed(FULL, piece={"whole": [4], "offset": [0, 0], "shape": [4, 3]}), "does not lie"),
    "a reduction over no such rank": (
        changed(FULL, piece={"whole": [4, 3], "offset": [0, 0], "shape": [4, 3], "pending": [["sum", [0, 9]]]}),
        '"rank" is 9',
    ),
    "statistics that are texts": (
        lambda lines: lines[7]["stats"].update(mean=1),
        '"stats" is',
    ),
    "statistics of another tensor": (
        lambda lines: lines[7]["stats"].update(count=4),
        '"count" is 4, and a tensor of its shape has 3',
    ),
    "a weight that is no number": (changed(FULL, weight="many"), "\"weight\" is 'many'"),
    "something of a missing tensor": (changed(FULL, missing=True), "that it says was not there"),
    "a closing line that counts otherwise": (changed(-1, records=3), '"records" is 3'),
    "deep nesting": (changed(1, axes=json.loads("[" * 50 + "]" * 50)), "nested more than 32 deep"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_value_that_cannot_be_ends_what_is_read_and_is_told(folder: Path, kind: str) -> None:
    change, said = BAD[kind]
    lines = lines_of(folder)
    change(lines)
    put(folder, lines)
    recording = looked_at(folder)
    assert recording is not None
    (problem,) = recording.problems
    assert problem.startswith("rank 0: line ")
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(problem)
    assert right_as_far_as_it_goes(recording) < 8 or kind == "a closing line that counts otherwise"
    assert recording.ranks[1].complete


RAW = {
    "a key that stands twice": (b'{"step":0,"stage":"loss","step":1,"name":"x","missing":true}', "'step' stands in it"),
    "such a key behind a blank": (b'{"step":0,"stage":"loss","step" :1,"name":"x","missing":true}', "'step' stands"),
    "bytes that are no text": (b'{"step":0,"stage":"loss","name":"\xff","missing":true}', "no UTF-8: byte 0xff"),
    "a bare NaN": (b'{"step":0,"stage":"loss","name":"x","missing":true,"weight":NaN}', 'NaN is no JSON; .* "nan"'),
    "nesting without end": (b'{"event":' + b"[" * 100_000, "nested too deep"),
    "no object": (b"[1]", "no JSON object"),
    "two objects": (b'{"event":"a"},{"event":"b"}', "no JSON: Extra data"),
    "an empty line": (b"", "no JSON"),
    "a line behind the last": (b'{"event":"closed","records":8}\n{"event":"more"}', "behind the closing line"),
    "too many digits": (b'{"step":' + b"1" * 5000 + b"}", "thousands of digits"),
    "nesting that is just read": (b'{"step":' + b"[" * 850 + b"]" * 850 + b"}", "not valid"),
}


@pytest.mark.parametrize("kind", RAW)
def test_a_line_that_is_no_record_is_told(folder: Path, kind: str) -> None:
    line, said = RAW[kind]
    path = folder / INDEX
    *before, _closed = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*before, line, b""]))
    recording = looked_at(folder)
    assert recording is not None
    assert right_as_far_as_it_goes(recording) == 8
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(recording.problems[0])


def test_a_name_that_looks_like_a_key_is_a_name(folder: Path) -> None:
    lines = lines_of(folder)
    lines.insert(-1, {"step": 1, "stage": "loss", "name": 'a":" b', "missing": True})
    lines[-1]["records"] = 9
    put(folder, lines)
    recording = looked_at(folder)
    assert recording is not None
    assert recording.complete
    assert recording.ranks[0].records[8].name == 'a":" b'


HEADERS = {
    "another kind of file": (b'{"hello":1}\n', "does not begin with"),
    "the wrong rank": (b'{"shardproof":"trace","version":1,"rank":1,"world_size":2}\n', '"rank" is 1, and its name'),
    "no ranks": (b'{"shardproof":"trace","version":1,"rank":0,"world_size":0}\n', '"world_size" is 0'),
    "too many ranks": (b'{"shardproof":"trace","version":1,"rank":0,"world_size":1e9}\n', '"world_size" is 1000000000'),
    "a version that is none": (b'{"shardproof":"trace","version":"1","rank":0,"world_size":2}\n', '"version" is'),
    "empty": (b"", "the file is empty"),
    "no text": (b"\xff\xfe\n", "no UTF-8"),
    "a pickle": (b"\x80\x04\x95\x0b\n", "no UTF-8"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_bad_header_makes_its_rank_missing(folder: Path, kind: str) -> None:
    header, said = HEADERS[kind]
    (folder / INDEX).write_bytes(header)
    recording = looked_at(folder)
    assert recording is not None
    assert recording.missing == (0,)
    assert recording.problems[0] == "nothing can be read of 1 of 2 ranks: 0"
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(recording.problems[1])
    (folder / "rank-00001.jsonl").unlink()
    with pytest.raises(TraceError, match="no rank of the recording can be read"):
        open_recording(folder)


def test_another_version_is_refused_by_name(folder: Path) -> None:
    (folder / INDEX).write_text('{"shardproof":"trace","version":2,"rank":0,"world_size":2}\n')
    with pytest.raises(TraceError, match=r"version 2; this shardproof reads version 1: read it with"):
        open_recording(folder)


def test_missing_ranks_and_ranks_of_another_run_are_told(recorded: Callable[..., Path]) -> None:
    folder = recorded(3)
    (folder / "rank-00001.jsonl").unlink()
    other = folder / "rank-00002.jsonl"
    other.write_text(other.read_text().replace('"world_size":3', '"world_size":4', 1))
    recording = open_recording(folder)
    assert (recording.world_size, list(recording.ranks), recording.missing) == (3, [0], (1, 2))
    assert recording.problems == (
        "nothing can be read of 2 of 3 ranks: 1, 2",
        "rank 2: is of a run of 4 ranks, rank 0 of one of 3; it is left out",
    )


def test_links_that_lead_out_and_things_that_are_no_files_are_not_opened(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes((folder / DATA).read_bytes())
    (folder / DATA).unlink()
    (folder / DATA).symlink_to(secret)
    (folder / "rank-00001.jsonl").unlink()
    os.mkfifo(folder / "rank-00001.jsonl")
    recording = looked_at(folder)
    assert recording is not None
    assert recording.ranks[0].records == ()
    assert "rank-00000.safetensors is a link that leads out of the folder" in recording.problems[-1]
    assert "rank-00001.jsonl is no file" in recording.problems[1]


def test_a_link_inside_the_folder_is_as_good_as_the_file(folder: Path) -> None:
    (folder / DATA).rename(folder / "elsewhere")
    (folder / DATA).symlink_to("elsewhere")
    assert open_recording(folder).complete


def test_data_that_are_missing_or_change_are_told(folder: Path) -> None:
    recording = open_recording(folder)
    trace = recording.ranks[0]
    assert len(trace.records) == 8
    (folder / DATA).write_bytes(b"")
    with pytest.raises(TraceError, match=r"rank 0 changed while it was read: .* has 0 bytes, and had"):
        trace.tensor(0)
    (folder / DATA).unlink()
    assert "rank-00000.safetensors is missing; 0 records" in open_recording(folder).problems[0]


def test_what_is_no_recording_says_what_one_is(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="does not exist; give the directory"):
        open_recording(tmp_path / "nowhere")
    with pytest.raises(TraceError, match=rf"is a file; a recording is a directory, perhaps {folder}"):
        open_recording(folder / INDEX)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(TraceError, match=r"holds no recording: it has no rank-00000.jsonl, and nothing else"):
        open_recording(other)
    (other / "model.pt").write_text("")
    with pytest.raises(TraceError, match=r"only model\.pt"):
        open_recording(other)


def write_for_ever(folder: Path) -> None:
    writer = Writer(folder, 0, 1, {})
    for number in count():
        tensor = torch.full((1000 + number % 50,), float(number))
        writer.write(Record(step=number, stage="gradient", name=f"m{number}"), tensor, depth="full")
        if number % 7 == 6:
            writer.event("step", step=number)
            writer.flush()


def test_a_killed_process_leaves_what_it_had_flushed(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path,), daemon=True)
    process.start()
    try:
        index = tmp_path / INDEX
        wait_until = time.monotonic() + 60
        while not index.exists() or index.stat().st_size < 50_000:
            assert time.monotonic() < wait_until
            time.sleep(0.01)
        flushed = index.read_bytes().count(b'"event"')
    finally:
        process.kill()
        process.join()
    recording = open_recording(tmp_path)
    trace = recording.ranks[0]
    assert len(trace.records) >= 7 * flushed > 0
    for number, record in enumerate(trace.records):
        assert record.name == f"m{number}"
        assert torch.equal(trace.tensor(number), torch.full((1000 + number % 50,), float(number)))
    assert not recording.complete
    assert "cut off" in recording.problems[0]
