"""Lines as the writer writes most of them: the same few texts again and again, and numbers.

A rank of hundreds shows what the others do, and a step what the one before it did. Such a line is taken apart by one
expression, which only lets through what is valid JSON with every field in its place; the texts in it are looked at once
and kept, and what is left are numbers. Every other line, right or wrong, is for `line.Reader` to read and to judge.
"""

from __future__ import annotations

import re
from typing import NamedTuple, TypeVar

from shardproof.parallel.piece import Piece
from shardproof.trace.folder.line import MOST_DIMS, QUICK, Kept, Reader
from shardproof.trace.record import Record

MOST = 2**16
"""Records that ranks may share: those of all steps of a rank, or its latest ones."""

_SIZE = rb"(?:0|[1-9][0-9]{0,14}+)"
"""A whole number that every reader of JSON takes alike."""

_SIZES = rb"\[(?:%b(?:,%b){0,%d}+)?\]" % (_SIZE, _SIZE, MOST_DIMS - 1)
_TEXT = rb'"[^"\\\x00-\x1f]*"'
_REAL = rb"-?(?:0|[1-9][0-9]{0,17}+)(?:\.[0-9]{1,20}+)?+(?:e[-+]?[0-9]{1,2}+)?+"
"""Far from the largest float there is."""

_PIECE = rb'\{"whole":%b,"offset":%b,"shape":%b(?:,"stretch":\[%b,%b\])?(?:,"declared":false)?\}' % (
    (_SIZES,) * 3 + (_SIZE,) * 2
)
_STATS = b",".join(
    b'"%b":%b' % (name, form)
    for name, form in (
        (b"count", b"(" + _SIZE + b")"),
        *((name, _SIZE) for name in (b"zeros", b"nans", b"infs")),
        *((name, _REAL) for name in (b"min", b"max", b"sum", b"square_sum", b"absmax")),
    )
)

_LINE = re.compile(
    b"".join(
        (
            rb'\{"step":(-1|%b)' % _SIZE,
            rb'(,"stage":"[a-z-]+","name":%b(?:,"part":%b)?(?:,"call":%b)?)' % (_TEXT, _TEXT, _SIZE),
            rb'(?:,"piece":(%b))?' % _PIECE,
            rb'(?:,"draws":(-?[1-9][0-9]{0,17}))?',
            rb'(,"depth":"[a-z]+","shape":%b,"dtype":"[a-z0-9_]+")' % _SIZES,
            rb'(?:,"stats":\{(%b)\})?' % _STATS,
            rb'((,"sketch":\{"by":"[a-z]+","dtype":"[a-z0-9]+")?',
            rb'(?:,"file":(0|[1-9][0-9]{0,5}),"at":(%b),"bytes":(%b))?)' % (_SIZE, _SIZE),
            rb"(?(9)\})\}",
        )
    )
)


def numbers(stats: bytes) -> tuple[int | float, ...]:
    """Statistics as `Kept` holds them, from their text."""
    return tuple(QUICK.decode(f"{{{stats.decode()}}}").values())


class _Form(NamedTuple):
    """What a rank keeps of a tensor, but for its statistics."""

    kept: Kept
    elements: bytes | None
    """How many as statistics spell it; None where there are none."""
    size: bytes | None
    """Bytes of its data, in the same way."""


Parts = tuple[bytes, ...]
"""Of a line: step, head, piece, draws, form, statistics, elements, tail, lead of the sketch, file, at, bytes; those
that it has not are None."""


class Usual:
    """Reads the usual lines of a recording's ranks, and remembers what `Reader` made of the texts in them."""

    def __init__(self) -> None:
        self._heads: dict[bytes, Record] = {}
        self._pieces: dict[bytes, Piece] = {}
        self._forms: dict[tuple[bytes, bytes | None], _Form] = {}
        # Ranks that show the same at the same step, and in the same place of their files, share what is made of it.
        self._records: dict[tuple[bytes, bytes], Record] = {}
        self._places: dict[tuple[bytes, bytes], _Form] = {}
        self._new: list[tuple[bytes, Record, Kept]] = []

    def taken_apart(self, lines: list[bytes]) -> list[Parts | None] | None:
        """The parts of those lines that are usual, and whose texts are known; None where no text is."""
        # A recording that is short, of one rank and one step, is never asked: it pays nothing.
        for line, record, kept in self._new:
            self._know(line, record, kept)
        self._new = []
        if not self._heads:
            return None
        return [self._known(found.groups()) if (found := _LINE.fullmatch(line)) else None for line in lines]

    def _known(self, parts: Parts) -> Parts | None:
        return parts if parts[1] in self._heads and (parts[4], parts[8]) in self._forms else None

    def learn(self, line: bytes, record: Record, kept: Kept) -> None:
        """Remember what `Reader` made of a line, should others be like it."""
        self._new.append((line, record, kept))

    def _know(self, line: bytes, record: Record, kept: Kept) -> None:
        found = _LINE.fullmatch(line)
        if found is not None:
            _, head, _, _, form, _, elements, _, sketch, _, _, size = found.groups()
            self._heads[head] = record
            self._forms[form, sketch] = _Form(kept, elements, size)

    def read(self, parts: Parts, reader: Reader) -> tuple[Record, Kept, bytes | None] | None:
        """The record of `reader`'s rank with these parts, and the text of its statistics.

        None where something is wrong that `reader.record` tells. Raises `Invalid`.
        """
        step, head, piece, draws, form, stats, elements, tail, sketch, file, at, size = parts
        kind = self._places.get((form, tail)) or self._placed(form, tail, sketch, file, at)
        place = None
        if piece is not None:
            place = self._pieces.get(piece)
            if place is None:
                place = self._pieces[piece] = reader.piece(QUICK.decode(piece.decode()))
        kept = kind.kept
        if elements != kind.elements or size != kind.size or (place is not None and place.local_shape != kept.shape):
            return None
        record = self._records.get((step, head)) if piece is None and draws is None else None
        if record is None:
            record = self._made(step, head, place, draws)
        if size is not None:
            reader.place(kept.file, kept.at, kept.bytes)
        return record, kept, stats

    def _made(self, step: bytes, head: bytes, piece: Piece | None, draws: bytes | None) -> Record:
        like = self._heads[head]
        found = Record(
            step=int(step),
            stage=like.stage,
            name=like.name,
            part=like.part,
            call=like.call,
            piece=piece,
            draws=0 if draws is None else int(draws),
        )
        if piece is None and draws is None:
            _remember(self._records, (step, head), found)
        return found

    def _placed(self, form: bytes, tail: bytes, sketch: bytes | None, file: bytes | None, at: bytes) -> _Form:
        """The same as elsewhere in a file."""
        like = self._forms[form, sketch]
        if file is None:
            return like
        depth, shape, dtype, _, _, size, keyed, sketch_dtype, _ = like.kept
        kept = Kept(depth, shape, dtype, int(file), int(at), size, keyed, sketch_dtype)
        found = _Form(kept, like.elements, like.size)
        _remember(self._places, (form, tail), found)
        return found


Key = TypeVar("Key")
Item = TypeVar("Item")


def _remember(known: dict[Key, Item], key: Key, item: Item) -> None:
    """So long as it is worth its room: a rank that goes on and on shows the same thing in ever new places."""
    if len(known) >= MOST:
        known.clear()
    known[key] = item
