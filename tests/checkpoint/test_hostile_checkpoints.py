"""A checkpoint that anybody may have made: it loads, or there is one `CheckpointError`, soon and in little memory."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bounded import bounded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from shardproof.checkpoint import index as indices
from shardproof.checkpoint.export import export
from shardproof.checkpoint.load import load, load_weights, read_extra
from shardproof.checkpoint.save import save
from shardproof.errors import CheckpointError
from shardproof.parallel.held import held_parameters

FULL = bool(os.environ.get("SHARDPROOF_FULL"))
FUZZ = settings(
    max_examples=3000 if FULL else 60,
    deadline=None,
    derandomize=not FULL,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
EXTRA = {"step": 3, "rates": (0.1, float("nan")), 4: torch.ones(2), "names": ["a", {"b": None}]}


class Trained:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.model(torch.ones(2, 3)).sum().backward()
        self.optimizer.step()

    @property
    def parts(self) -> tuple[nn.Module, list[Any], torch.optim.Optimizer]:
        return self.model, list(held_parameters(self.model)), self.optimizer


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    with bounded(512 * 2**20, seconds=60):
        yield


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "step-00000001"
    save(path, *Trained().parts, EXTRA)
    return path


def refusals(path: Path) -> list[str]:
    """What each reader of a checkpoint says of it; empty texts where it reads it."""
    found = []
    readers: tuple[Callable[[], object], ...] = (
        lambda: read_extra(path),
        lambda: export(path, path.parent / "out.safetensors"),
        lambda: load(path, *Trained().parts),
    )
    for read in readers:
        try:
            read()
        except CheckpointError as error:
            found.append(str(error))
            assert len(found[-1]) < 2000
        else:
            found.append("")
    return found


def put(path: Path, text: str | bytes) -> None:
    (path / "index.json").write_bytes(text.encode() if isinstance(text, str) else text)


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((path / "index.json").read_text())
    change(index)
    put(path, json.dumps(index))


def test_a_good_one_is_read_by_all(good: Path) -> None:
    assert refusals(good) == ["", "", ""]


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"tuple": [value]}
    return value


def chunks(index: dict[str, Any], key: str = "model/0.weight") -> list[dict[str, Any]]:
    return index["tensors"][key]["chunks"]


def many_empty(index: dict[str, Any]) -> None:
    empty = {**chunks(index)[0], "shape": [0, 3], "offset": [0, 0]}
    chunks(index).extend([empty] * 20_000)


def many_of_many_dims(index: dict[str, Any], dims: int = 11) -> None:
    one = chunks(index)[0]
    index["tensors"]["model/0.weight"] = {
        "shape": [2] * dims,
        "dtype": "uint8",
        "chunks": [
            {**one, "offset": [number >> bit & 1 for bit in range(dims)], "shape": [1] * dims}
            for number in range(2**dims)
        ],
    }
    index["files"][one["file"]] = 2**20


INDEXES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "data that are nested without end": (lambda i: i.update(extra=nested(300)), "nested more than 200 deep"),
    "a number that is none": (lambda i: i.update(extra={"dict": {"a": {"float": "many"}}}), "never writes"),
    "a tensor of texts": (lambda i: i.update(extra={"tensor": ["a"], "dtype": "float32"}), "never writes"),
    "a ragged tensor": (lambda i: i.update(extra={"tensor": [[1], 2], "dtype": "float32"}), "never writes"),
    "a list for a key": (lambda i: i.update(extra={"items": [[[], 1]]}), "never writes"),
    "no pair": (lambda i: i.update(extra={"items": [1]}), "never writes"),
    "an object of another world": (lambda i: i.update(extra={"pickle": "gASV"}), "no value that shardproof writes"),
    "no extra": (lambda i: i.update(extra=[1]), "holds no `extra`"),
    "a size of many digits": (lambda i: chunks(i)[0].update(shape=[10**400, 0]), "is no size"),
    "sizes that no tensor has": (lambda i: chunks(i)[0].update(shape=[2**40, 2**40]), "no tensor is that large"),
    "a shape that is a text": (lambda i: chunks(i)[0].update(shape="12"), "is no list of sizes"),
    "very many dims": (lambda i: chunks(i)[0].update(shape=[1] * 5000), "is no list of sizes"),
    "a dtype that is a list": (lambda i: i["tensors"]["model/0.weight"].update(dtype=[]), "there is no dtype"),
    "a huge tensor without elements": (
        lambda i: i["tensors"].update({"model/x": {"shape": [0, 2**60], "dtype": "float32", "chunks": []}}),
        "is no size",
    ),
    "a name of other digits": (
        lambda i: i["files"].update({"rank-\u0660\u0660\u0660\u0660\u0660.safetensors": 8}),
        "is no file of a checkpoint",
    ),
    "a name that steers a terminal": (lambda i: i["files"].update({"\x1b[2J": 8}), r"'\x1b[2J' is no file"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_that_nobody_writes_is_refused_at_once(good: Path, kind: str) -> None:
    change, said = INDEXES[kind]
    edited(good, change)
    answers = refusals(good)
    assert all(answer.isprintable() for answer in answers)
    assert any(said in answer for answer in answers)


def test_chunks_that_take_long_to_tell_apart_are_refused_soon(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indices, "MOST_PAIRS", 10_000)
    edited(good, many_empty)
    assert read_extra(good)["step"] == 3
    edited(good, many_of_many_dims)
    with pytest.raises(CheckpointError, match="2048 chunks are more than a tensor of 11 dims is cut into"):
        read_extra(good)


TEXTS = {
    "a key that stands twice": (lambda t: t.replace('"version":1', '"version":1,"version":1'), "stands in it twice"),
    "a bare NaN": (lambda t: t.replace('"version":1', '"version":NaN'), "NaN is no JSON"),
    "too many digits": (lambda t: t.replace('"version":1', f'"version":{"1" * 5000}'), "thousands of digits"),
    "nesting without end": (lambda t: "[" * 10**6, "nested too deep"),
    "no object": (lambda t: "[]", "no JSON object"),
    "no text": (lambda t: b"\xff\xfe", "no UTF-8"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_that_two_readers_take_differently_is_refused(good: Path, kind: str) -> None:
    change, said = TEXTS[kind]
    put(good, change((good / "index.json").read_text()))
    assert all(said in answer for answer in refusals(good))


def test_an_index_without_end_is_refused_before_it_is_read(good: Path) -> None:
    os.truncate(good / "index.json", 2**40)
    assert all("it has 1099511627776 bytes; 1073741824 at most" in answer for answer in refusals(good))


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["SHARDPROOF_BOMB"],)


@pytest.mark.parametrize("file", ["index.json", "rank-00000.safetensors", ".metadata", "weights.safetensors"])
def test_a_pickle_in_place_of_any_file_is_never_run(
    good: Path, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone_off = tmp_path / "it went off"
    monkeypatch.setenv("SHARDPROOF_BOMB", str(gone_off))
    as_torch_saves = tmp_path / "bomb.pt"
    torch.save(Bomb(), as_torch_saves)
    for content in (pickle.dumps(Bomb()), as_torch_saves.read_bytes()):
        (good / file).write_bytes(content)
        if file.startswith("rank"):
            sizes = {file: len(content)}
            edited(good, lambda index, sizes=sizes: index["files"].update(sizes))
        refusals(good)
        if file == "weights.safetensors":
            with pytest.raises(CheckpointError, match="is no whole safetensors file"):
                load_weights(good / file, *Trained().parts[:2])
    assert not gone_off.exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert gone_off.exists()


def test_what_is_no_file_or_lies_elsewhere_is_not_opened(good: Path, tmp_path: Path) -> None:
    data = good / "rank-00000.safetensors"
    elsewhere = tmp_path / "elsewhere"
    data.rename(elsewhere)
    data.symlink_to(elsewhere)
    assert all("is a link that leads out of the folder" in answer for answer in refusals(good))
    data.unlink()
    os.mkfifo(data)
    edited(good, lambda index: index.update(files={data.name: 0}, tensors={}))
    assert all("is no file" in answer for answer in refusals(good))
    data.unlink()
    data.mkdir()
    assert all("is no file" in answer for answer in refusals(good))
    (good / "index.json").unlink()
    os.mkfifo(good / "index.json")
    assert all("has no index.json" in answer for answer in refusals(good))


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../x", "/etc/passwd", "\x1b[31m", "\ud800", 2**53, 2**63, "float32", "rank-00000.safetensors"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=5) | st.sampled_from(["float", "tuple", "dict", "items", "tensor"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@FUZZ
@given(st.data())
def test_a_changed_value_anywhere_in_the_index_loads_or_is_refused(good: Path, data: st.DataObject) -> None:
    content = (good / "index.json").read_bytes()
    index = json.loads(content)
    target: Any = index
    while True:
        key = data.draw(st.sampled_from(sorted(target) if isinstance(target, dict) else range(len(target))))
        if not isinstance(target[key], dict | list) or not target[key] or data.draw(st.integers(0, 3)) == 0:
            break
        target = target[key]
    if isinstance(target, dict) and data.draw(st.integers(0, 3)) == 0:
        target[data.draw(st.text(max_size=8))] = target.pop(key)
    else:
        target[key] = data.draw(JUNK)
    put(good, json.dumps(index))
    refusals(good)
    put(good, content)


@FUZZ
@given(st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_flipped_bytes_load_or_are_refused(good: Path, flips: list[tuple[float, int]], of_index: bool) -> None:
    path = good / ("index.json" if of_index else "rank-00000.safetensors")
    content = path.read_bytes()
    changed = bytearray(content)
    for at, byte in flips:
        # Of the data the header is what is read.
        changed[int(at * min(len(content), 1500))] = byte
    path.write_bytes(changed)
    refusals(good)
    path.write_bytes(content)
