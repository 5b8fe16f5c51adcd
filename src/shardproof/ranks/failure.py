"""What to say about an exception: where in the user's own code, and whether it is a cause or an echo."""

from __future__ import annotations

import os
import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from shardproof.errors import Failure

MAX_CHARS = 20_000
"""Of a message and of a traceback: some exceptions bring a whole tensor or a log along."""

OUR_FOLDER = str(Path(__file__).parents[1]) + os.sep

_LIBRARIES = tuple(
    sorted({path + os.sep for key in ("stdlib", "platstdlib") if (path := sysconfig.get_path(key)) is not None})
)
_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")

_PEER_LOST = re.compile(
    "|".join(
        (
            r"Connection closed by peer",  # gloo: the peer ended in the middle of a collective
            r"Connection reset by peer",
            r"Connection refused",  # gloo: the peer ended before it was connected to
            r"Connection was likely closed",  # the store went away
            r"Broken pipe",
            r"Socket Timeout|Timed out waiting|wait timeout",  # gloo and store: the peer never came
            r"remote process exited",  # NCCL
            r"NCCL communicator was aborted",  # NCCL: its watchdog has given up on a peer
            r"collective operation timeout",  # likewise
            r"failed to (recv|send|connect)",  # store
        )
    ),
    re.IGNORECASE,
)


def describe(error: BaseException, rank: int) -> Failure:
    """`error` as plain data, seen from the user's code. Call it where the exception was caught."""
    report = traceback.TracebackException.from_exception(error)
    frames = list(report.stack)
    theirs = [frame for frame in frames if is_user_code(frame.filename)]
    innermost = next(iter(reversed(theirs or frames)), None)
    for link in _links(report):
        first = next((i for i, frame in enumerate(link.stack) if is_user_code(frame.filename)), 0)
        del link.stack[:first]
    return Failure(
        rank=rank,
        type_name=type(error).__name__,
        message=_shortened(_text(error)),
        file=innermost.filename if innermost else "<unknown>",
        line=(innermost.lineno or 0) if innermost else 0,
        traceback=_shortened("".join(report.format())),
    )


def is_user_code(file: str) -> bool:
    """Whether `file` is neither ours, nor Python's, nor an installed package's, nor generated."""
    if file.startswith("<"):
        return False
    return not (_INSTALLED.search(file) or file.startswith((OUR_FOLDER, *_LIBRARIES)))


def only_waited(error: BaseException) -> bool:
    """Whether `error` says no more than that a peer is gone: an echo of what happened on another rank."""
    from torch.distributed import DistError  # noqa: PLC0415  (the room must be importable without torch)

    return any(
        isinstance(link, DistError) or (isinstance(link, RuntimeError | OSError) and _PEER_LOST.search(_text(link)))
        for link in _chain(error)
    )


def lost_peer(error: BaseException) -> bool:
    """Whether a collective raised `error` because another process is gone, does not answer, or cannot be reached.

    Stricter than `only_waited`, which looks for the cause among several errors: errors of NCCL that say something
    else and connections of the user's own code, which break as well, are not meant here.
    """
    from torch.distributed import DistNetworkError, DistStoreError  # noqa: PLC0415  (as above)

    return any(
        isinstance(link, DistNetworkError | DistStoreError)
        or (isinstance(link, RuntimeError) and _PEER_LOST.search(_text(link)))
        for link in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error` and what it was raised from."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _links(report: traceback.TracebackException) -> Iterator[traceback.TracebackException]:
    yield report
    for linked in (report.__cause__, report.__context__, *(report.exceptions or ())):
        if linked is not None:
            yield from _links(linked)


def _shortened(text: str) -> str:
    if len(text) <= MAX_CHARS:
        return text
    half = MAX_CHARS // 2
    return f"{text[:half]} ... {len(text) - 2 * half} characters left out ... {text[-half:]}"


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:  # noqa: BLE001  (user classes may raise anything here, and the first error matters more)
        return f"<its message cannot be shown: {type(broken).__name__}>"
