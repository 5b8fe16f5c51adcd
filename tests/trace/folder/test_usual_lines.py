"""Lines that look like earlier ones are read by another way than all others: the same comes of it, right or wrong."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shardproof.parallel.piece import Piece
from shardproof.trace.folder import index
from shardproof.trace.folder.index import Index
from shardproof.trace.folder.reader import open_recording
from shardproof.trace.folder.usual import Usual, numbers
from shardproof.trace.folder.writer import Depth, Writer
from shardproof.trace.record import Record
from shardproof.trace.stats import stats_of

SPOILT = (
    *("-1", "00", "1.0", "1e5", "-0", "+1", "true", "null", '"1"', "[]", "{}", "NaN", '"nan"', "Infinity", "1e999"),
    *("9" * digits for digits in (6, 7, 15, 16, 17, 18, 19, 20, 25, 5000)),
    *("", ",", '""', '"', "\\", "0.1e-300", "1" + "0" * 18 + ".5", "4", "8", "64", "1024"),
)
"""What stands in place of a number."""


def entries(rank: int) -> Iterator[tuple[Record, torch.Tensor, Depth]]:
    """Records of all depths, of two steps, that every rank shows."""
    drawn = torch.Generator().manual_seed(rank)
    piece = Piece(whole=(8, 3), offset=(4 * rank, 0), shape=(4, 3))
    flat = Piece(whole=(8, 3), offset=(0, 0), shape=(8, 3), stretch=(12 * rank, 12 * rank + 12), declared=False)
    weight = torch.randn(4, 3, generator=drawn)
    for step in range(2):
        yield Record(step=step, stage="forward", name="fc.注", part="[0]", call=2, draws=-5 - rank), weight, "sketch"
        yield Record(step=step, stage="gradient", name="fc.weight", piece=piece), weight, "sketch"
        yield Record(step=step, stage="gradient", name="flat", piece=flat), weight.reshape(-1).double(), "sketch"
        yield Record(step=step, stage="backward", name="fc.注"), weight, "full"
        yield Record(step=step, stage="update", name="fc.weight", piece=piece), weight, "stats"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for rank in range(2):
        writer = Writer(tmp_path / "run", rank, 2, {})
        for record, tensor, depth in entries(rank):
            writer.write(record, tensor, depth=depth)
        writer.close()
    return tmp_path / "run"


class Ranks:
    """Reads an index of the last rank as one that comes after those of other ranks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.lines = (folder / "rank-00001.jsonl").read_bytes().splitlines()[1:]
        self._before = (folder / "rank-00000.jsonl").read_bytes().splitlines()[1:]
        self._usual = Usual()
        assert self._read(self._before, 0).closed

    def _read(self, lines: list[bytes], rank: int) -> Index:
        size = (self._folder / f"rank-{rank:05d}.safetensors").stat().st_size
        return index.read(io.BytesIO(b"\n".join(lines) + b"\n"), 2, lambda _: size, self._usual)

    def told(self, at: int, line: bytes) -> tuple[object, ...]:
        """All that is to be learned with `line` in the place of line `at`."""
        found = self._read([*self.lines[:at], line, *self.lines[at + 1 :]], 1)
        texts = zip(found.stats, found.kept, strict=True)
        stats = [numbers(text) if text is not None else kept.stats for text, kept in texts]
        # 1 is 1.0 and true, and NaN not itself, but not as they are spelled.
        return found.problem, repr(found.records), repr([k._replace(stats=None) for k in found.kept]), repr(stats)

    def agree(self, at: int, line: bytes) -> bool:
        """Reads `line` in the place of line `at` as it is, and as one that is not usual; whether it is wrong."""
        usual = self.told(at, line)
        assert usual == self.told(at, respelled(line)), line
        return bool(usual[0])


def respelled(line: bytes) -> bytes:
    """The same line as it is not usually written: with a blank."""
    return line.replace(b"{", b"{ ", 1)


def test_usual_lines_are_read_as_any_others(folder: Path) -> None:
    trace = open_recording(folder).ranks[1]
    ranks = Ranks(folder)
    assert trace.complete
    assert list(trace.records) == [record for record, _, _ in entries(1)]
    for number, (_, tensor, depth) in enumerate(entries(1)):
        assert not ranks.agree(number, ranks.lines[number])
        if depth != "full":
            assert trace.stats(number) == stats_of(tensor)
        if depth == "sketch":
            held = trace.kept(number)
            assert trace.words(held).tobytes() == trace.sketch(number).numpy().tobytes()


def test_a_wrong_number_is_told_as_in_any_other_line(folder: Path) -> None:
    ranks = Ranks(folder)
    # One of each kind, of the second step: the texts around the numbers are known by then.
    wrong = [
        ranks.agree(at, line[: found.start()] + spoilt.encode() + line[found.end() :])
        for at, line in enumerate(ranks.lines[5:10], 5)
        for found in re.finditer(rb"-?\d[\d.e+-]*", line)
        for spoilt in SPOILT
    ]
    assert sum(wrong) > 1000


def test_damaged_text_is_told_as_in_any_other_line(folder: Path) -> None:
    ranks, drawn, wrong = Ranks(folder), random.Random(0), []
    for _ in range(1500):
        at = drawn.randrange(5, 10)
        line, other = bytearray(ranks.lines[at]), drawn.choice(ranks.lines)
        start, cut = drawn.randrange(1, len(line)), drawn.randrange(len(other))
        # A byte is another one, some are gone or stand twice, or a stretch of another line stands there.
        new = drawn.choice(
            [bytes([drawn.choice(b'"{}[],:\\0a \xff\x00\t')]), b"", line[start - 9 : start], other[cut:]]
        )
        line[start : start + drawn.choice([0, 1, 1, 5])] = new
        wrong.append(ranks.agree(at, bytes(line)))
    assert sum(wrong) > 1000
