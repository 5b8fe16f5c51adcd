"""Libraries that only some users need: none is loaded before it is used, and a missing one says how to get it."""

from __future__ import annotations

from importlib.util import find_spec

from shardproof.errors import UsageError


def require(library: str, *, extra: str, by: str) -> None:
    """Raise `UsageError`, with the command that installs it, where `library` is not there. Loads nothing.

    `extra` is shardproof's extra that brings it, `by` what needs it.
    """
    spec = find_spec(library)
    # A folder `wandb` or `tensorboard` in the working directory, which these libraries themselves write, is found as
    # a namespace package: it has no file of its own.
    if spec is None or spec.origin is None:
        raise UsageError(f"{by} needs {library}, which is not installed; run: pip install 'shardproof[{extra}]'")
