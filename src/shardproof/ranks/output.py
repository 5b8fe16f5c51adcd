"""What user code prints on ranks: caught in one file a rank, cut, grouped, labelled."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TextIO

from shardproof.ranks.disk import give_back

MAX_LINES = 200
"""Lines shown of one rank at a time: as many from the start as from the end."""
MAX_BYTES = 64 * 1024
"""Bytes shown of one rank at a time, likewise."""

_FREE_BYTES = 1024 * 1024
"""Space is given back in pieces of at least this size."""
_LINE_BUFFERED = 1
"""_IOLBF of C's stdio.h, on Linux."""


class Caught:
    """The output of one rank. The file has no name, so that nothing is left of it however the processes end."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="shardproof-")  # noqa: SIM115  (open as long as the rank lives)
        self._shown = 0
        self._freed = 0

    def catch(self) -> None:
        """Run by the rank: whatever it writes to stdout and stderr from now on, native code included, is caught."""
        os.dup2(self._file.fileno(), 1)
        os.dup2(self._file.fileno(), 2)
        # C holds back what it writes to a file; line by line, it stays in order with what Python writes.
        native = ctypes.CDLL(None)
        native.setvbuf(ctypes.c_void_p.in_dll(native, "stdout"), None, _LINE_BUFFERED, 0)
        # Not the parent's objects: a test runner or a notebook may have replaced them.
        sys.stdout, sys.stderr = _stream(1), _stream(2)
        # Likewise: under pytest, warnings are recorded in a list of the parent's, of which the rank has a copy.
        warnings.showwarning = _show_warning

    def has_more(self) -> bool:
        """Run by the parent: whether the rank has written anything since the last `new_lines`."""
        return self._size() > self._shown

    def new_lines(self, *, whole: bool = False) -> list[str]:
        """Run by the parent: the lines since the last time, cut to `MAX_LINES` and `MAX_BYTES`.

        A line that is not over yet waits for the next time where only `whole` lines are wanted, unless it is endless.
        """
        start, stop = self._shown, self._size()
        if whole:
            newest = self._read(max(start, stop - MAX_BYTES), stop)
            unfinished = len(newest) - (newest.rfind(b"\n") + 1)
            stop -= unfinished if unfinished < MAX_BYTES else 0
        self._shown = stop
        if stop - start <= MAX_BYTES:
            lines = _lines(self._read(start, stop))
            if len(lines) <= MAX_LINES:
                return lines
            head = tail = lines
            total = len(lines)
        else:
            head = _lines(self._read(start, start + MAX_BYTES // 2))
            tail = _lines(self._read(stop - MAX_BYTES // 2, stop))
            chunks = range(start, stop, MAX_BYTES)
            total = sum(self._read(at, min(at + MAX_BYTES, stop)).count(b"\n") for at in chunks)
        head, tail = head[: MAX_LINES // 2], tail[-(MAX_LINES // 2) :]
        left_out = total - len(head) - len(tail)
        note = f"... {left_out} lines left out ..." if left_out > 0 else "... the middle of a long line left out ..."
        return [*head, note, *tail]

    def free(self) -> None:
        """Run by the parent: gives back the disk space of what was shown, so that a run of weeks fills no disk."""
        if self._shown - self._freed >= _FREE_BYTES:
            self._freed = self._shown
            give_back(self._file.fileno(), self._shown)

    def close(self) -> None:
        """Gives the file back."""
        self._file.close()

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _read(self, start: int, stop: int) -> bytes:
        # pread: the rank writes at the position that both processes share, which must not move.
        return os.pread(self._file.fileno(), stop - start, start)


def flush() -> None:
    """Writes out what Python and C hold back, so that it is seen before what comes next."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            continue  # none at all, or closed: there is nothing to write
    ctypes.CDLL(None).fflush(None)


def grouped(lines: Mapping[int, Sequence[str]]) -> Iterator[tuple[tuple[int, ...], str]]:
    """Each line once, with the ranks that printed it, in an order that keeps every rank's own."""
    left = {rank: list(reversed(of_rank)) for rank, of_rank in sorted(lines.items()) if of_rank}
    ahead = {rank: Counter(of_rank) for rank, of_rank in left.items()}
    while left:
        heads = {rank: of_rank[-1] for rank, of_rank in left.items()}
        # A line that another rank prints later on waits for it; where all wait for each other, the lowest rank goes.
        ready = (head for head in heads.values() if all(heads[rank] == head or not ahead[rank][head] for rank in left))
        line = next(ready, next(iter(heads.values())))
        together = tuple(rank for rank, head in heads.items() if head == line)
        yield together, line
        for rank in together:
            ahead[rank][line] -= 1
            left[rank].pop()
            if not left[rank]:
                del left[rank]


def label(ranks: Sequence[int], during: str) -> str:
    """`[ddp ranks 0-3]`, `[ddp rank 1]`, `[ranks 0, 2-3]`."""
    return f"[{during + ' ' if during else ''}{'rank' if len(ranks) == 1 else 'ranks'} {numbers(ranks)}]"


def numbers(ranks: Iterable[int]) -> str:
    """`0-3`, `0, 2-3`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    (file or sys.stderr).write(warnings.formatwarning(message, category, filename, lineno, line))


def _stream(descriptor: int) -> TextIO:
    # Line by line, so that a rank that is killed has said all but its last line.
    return open(descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


def _lines(text: bytes) -> list[str]:
    lines = text.decode(errors="replace").split("\n")
    if not lines[-1]:
        lines.pop()  # the text ends with a whole line
    # Of a progress bar, which draws over itself, only the last state is shown.
    return [line.rstrip().rpartition("\r")[2] for line in lines]
