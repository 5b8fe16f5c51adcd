"""Makes sure that a file of a recording is a file, and lies in its folder."""

from __future__ import annotations

from pathlib import Path

from shardproof.trace.folder.line import Invalid


def size_within(folder: Path, path: Path) -> int:
    """The size in bytes of a file that really lies in `folder`. Raises `Invalid` for anything else."""
    try:
        # Before it is opened: opening a pipe waits for somebody to write into it.
        if not path.resolve(strict=True).is_relative_to(folder.resolve()):
            raise Invalid(f"{path.name} is a link that leads out of the folder")
        if not path.is_file():
            raise Invalid(f"{path.name} is no file")
        return path.stat().st_size
    except FileNotFoundError:
        raise Invalid(f"{path.name} is missing") from None
    except (OSError, RuntimeError) as error:
        # A loop of links is a RuntimeError in some versions of Python.
        raise Invalid(f"{path.name} cannot be read: {error}") from None
