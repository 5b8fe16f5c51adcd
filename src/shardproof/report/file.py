"""Write a report to a file: wholly or not at all, and with a clear word where it cannot be."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from shardproof.errors import UsageError


def check(path: Path) -> None:
    """Raise `UsageError` where `path` cannot be written, so that nobody waits for a report that is then lost."""
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; name a file in it")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{path}: may not be written")


def write(path: Path, text: str) -> None:
    """Replace `path` by `text` in one move, so that a reader never sees half a report.

    Raises `UsageError` where the folder is missing or may not be written.
    """
    check(path)
    # Half a surrogate pair in a name is not worth a report.
    content = text.encode("utf-8", "backslashreplace")
    try:
        if path.exists() and not path.is_file():
            # /dev/stdout and pipes: they are written to, not replaced.
            path.write_bytes(content)
        else:
            # Through a link to the file itself.
            _replace(path.resolve(), content)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror or error}") from error


def _replace(target: Path, content: bytes) -> None:
    # Beside it, as a move across file systems would not be one move; under a name that nobody can have taken before,
    # as a link that waits there would lead the content elsewhere.
    unfinished = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.part")
    try:
        with unfinished.open("xb") as file:
            file.write(content)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
