"""Where checkpoints lie: their names, the newest, what stays, and what killed saves leave behind.

A checkpoint is written under a hidden name and renamed when it is whole, so whatever bears a final name is complete.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

from shardproof.checkpoint import index
from shardproof.checkpoint.stream import folder_to_disk
from shardproof.errors import CheckpointError

STEP = re.compile(r"step-(\d{8,})")
"""What checkpoints of a run are called."""

HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<state>writing-[0-9a-f]{8}|replaced|deleted-[0-9a-f]{8})")
"""Names of checkpoints that are not there yet, or no more."""


def step_name(step: int) -> str:
    """`step-00000500`: sorts by step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint of a run is of, by its name."""
    return int(path.name.removeprefix("step-"))


def make(folder: Path) -> None:
    """Make a run's folder where there is none, and try whether checkpoints can be put there.

    Raises `CheckpointError` where they cannot: better before the first step than after the first hours.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is to hold checkpoints and is no folder; choose another save_folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tried = writing_name(folder / "nothing")
        tried.mkdir()
        tried.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot hold checkpoints ({error.strerror}); choose another save_folder"
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run's folder, oldest step first. Empty where there is no such folder."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = STEP.fullmatch(path.name)
        if match and (path / index.FILE_NAME).is_file():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    return next(reversed(checkpoints(folder)), None)


def writing_name(path: Path) -> Path:
    """A hidden name beside `path` to write under; a new one each time, as a killed save may still be at work."""
    return path.with_name(f".{path.name}.writing-{secrets.token_hex(4)}")


def put(written: Path, path: Path) -> None:
    """Give a complete checkpoint its final name, in place of an older one of that name if there is one.

    Wherever this is interrupted, `recover` finds one of the two whole. Raises `OSError`, and
    `CheckpointError` where something else bears that name.
    """
    folder_to_disk(written)
    recover(path)
    refuse_strangers(path)
    replaced = _replaced(path)
    if path.exists():
        path.rename(replaced)
    try:
        written.rename(path)
    except OSError:
        recover(path)
        raise
    folder_to_disk(path.parent)
    _let_go([replaced] if replaced.exists() else [])


def refuse_strangers(path: Path) -> None:
    """Raise `CheckpointError` where `path` is anything but a checkpoint: saving there would delete it."""
    if path.exists() and not (path / index.FILE_NAME).is_file():
        raise CheckpointError(
            f"{path} exists and is no checkpoint; saving there would delete it. Save to a new folder inside, "
            f"as {path / step_name(500)}"
        )


def recover(path: Path) -> None:
    """Bring back the checkpoint that was called `path` where a save was killed between two renames."""
    replaced = _replaced(path)
    if replaced.is_dir():
        if path.exists():
            remove(replaced)
        else:
            replaced.rename(path)


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def prune(folder: Path, keep: int, standing: Path | None = None) -> None:
    """Delete all but the `keep` newest checkpoints. `standing`, which was just written, stays whatever its step.

    Warns where one cannot be deleted: no training should end for that.
    """
    others = [path for path in checkpoints(folder) if standing is None or path.name != standing.name]
    stay = keep if standing is None else keep - 1
    _let_go(others[: max(len(others) - stay, 0)])


def _let_go(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            remove(path)
        except OSError as error:
            warnings.warn(f"an old checkpoint cannot be deleted: {error}", RuntimeWarning, stacklevel=3)


def remove(path: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that a half-deleted one is never taken for a whole one."""
    hidden = path
    if not HIDDEN.fullmatch(path.name):
        hidden = path.with_name(f".{path.name}.deleted-{secrets.token_hex(4)}")
        path.rename(hidden)
    shutil.rmtree(hidden)


def clean(folder: Path) -> None:
    """Tidy up after killed saves. Only where nobody is saving into `folder`. Raises `CheckpointError`."""
    try:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            match = HIDDEN.fullmatch(path.name)
            if match and path.is_dir():
                if match["state"] == "replaced":
                    recover(folder / match["name"])
                else:
                    shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be tidied up: {error}; check its permissions") from error


def resolve(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that `path` means: itself, or the newest one inside. Whether there is any, reading will tell."""
    found = Path(path)
    if _replaced(found).is_dir() and not found.exists():
        recover(found)
    if found.is_dir() and not (found / index.FILE_NAME).is_file():
        return newest(found) or found
    return found
