"""Every reader of files, fed with bytes that a fuzzer makes: no crash, no hang, no more memory than the input is worth.

`SHARDPROOF_FULL=1` runs it for minutes and differently each time; docs/security.md says what else there is.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import targets
from bounded import bounded
from hypothesis import given, settings
from hypothesis import strategies as st

from shardproof.errors import TraceError
from shardproof.trace.folder.reader import open_recording

FULL = bool(os.environ.get("SHARDPROOF_FULL"))
FUZZ = settings(max_examples=5000 if FULL else 60, deadline=None, derandomize=not FULL)

MEMORY_BYTES = 256 * 2**20
"""More than the process has. The inputs here have kilobytes."""
SECONDS = 10
"""For one input. Each takes milliseconds."""

PARTS = st.sampled_from(
    [
        *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\n", b"0", b"-1", b"1e999", b"NaN", b"true", b"null", b'"nan"'),
        *(
            b'"shape":',
            b'"piece":',
            b'"event":"closed"',
            b'"records":',
            b'"step":',
            b'"dtype":"F32"',
            b'"data_offsets":',
        ),
        *(b"\xff", b"\x00", b"\x1b[2J", b"\\ud800", b"9" * 30, b"[" * 2000, b"1152921504606846976", b"../"),
    ]
)
"""What turns one file into another."""


@st.composite
def changed(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Right bytes, of which a few stretches are cut out, doubled, overwritten or filled with something else."""
    content = bytearray(draw(st.sampled_from(seeds)))
    # A header ends in room that is kept free: what is said stands before it.
    said = len(content[:4096].rstrip(b" ")) + 8
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, said))
        stop = start + draw(st.integers(0, 12))
        content[start:stop] = draw(
            st.one_of(PARTS, st.binary(max_size=12), st.just(bytes(content[start:stop]) * 2), st.just(b""))
        )
    return bytes(content)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_changed_bytes_are_read_or_refused(name: str) -> None:
    read, seeds = targets.TARGETS[name]

    @FUZZ
    @given(changed(seeds()))
    def fuzz(content: bytes) -> None:
        # Around each input alone: hypothesis keeps those that it has made.
        with bounded(MEMORY_BYTES, seconds=SECONDS):
            read(content)

    fuzz()


@pytest.mark.parametrize("name", targets.TARGETS)
def test_any_bytes_are_read_or_refused(name: str) -> None:
    read, _ = targets.TARGETS[name]

    @FUZZ
    @given(st.lists(PARTS | st.binary(max_size=8), max_size=12).map(b"".join))
    def fuzz(content: bytes) -> None:
        # Around each input alone: hypothesis keeps those that it has made.
        with bounded(MEMORY_BYTES, seconds=SECONDS):
            read(content)

    fuzz()


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["SHARDPROOF_BOMB"],)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_pickle_in_place_of_a_file_is_never_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDPROOF_BOMB", str(tmp_path / "it went off"))
    read, seeds = targets.TARGETS[name]
    bomb = pickle.dumps(Bomb())
    for content in (bomb, bomb + seeds()[0], seeds()[0] + bomb):
        read(content)
    assert not (tmp_path / "it went off").exists()


SPARSE = 2**42
"""Bytes that a file says it has, and that are on no disk."""


def test_files_without_end_are_refused_in_little_memory(tmp_path: Path) -> None:
    folder = tmp_path / "endless"
    folder.mkdir()
    header = b'{"shardproof":"trace","version":1,"rank":0,"world_size":1}\n'
    for content, said in ((header, "longer than 67108864 bytes"), (b"", "its header is not whole")):
        (folder / targets.INDEX).write_bytes(content)
        os.truncate(folder / targets.INDEX, SPARSE)
        with bounded(MEMORY_BYTES, seconds=SECONDS):
            try:
                problems = open_recording(folder).problems
            except TraceError as error:
                problems = (str(error),)
        assert said in problems[-1]


def test_a_data_file_without_end_is_no_reason_to_read_it(tmp_path: Path) -> None:
    content = (targets.recording() / targets.DATA).read_bytes()
    path = targets.recording() / targets.DATA
    os.truncate(path, SPARSE)
    try:
        with bounded(MEMORY_BYTES, seconds=SECONDS):
            trace = open_recording(targets.recording()).ranks[0]
            # In so little memory it cannot even be mapped.
            with pytest.raises(TraceError, match="cannot be mapped"):
                trace.tensor(0)
    finally:
        path.write_bytes(content)
