"""Where the parts of an experiment stand in their author's files, so that a message can point there."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from shardproof.ranks.failure import is_user_code
from shardproof.spec.experiment import Experiment

WHOLE = "experiment"
"""The key of the experiment itself."""

PARTS = tuple(field.name for field in fields(Experiment))


@dataclass(frozen=True, slots=True)
class Place:
    """A line of a file."""

    file: str
    """Absolute path."""

    line: int
    """From 1."""


def places(experiment: Experiment) -> Mapping[str, Place]:
    """Field of the experiment -> where its value was written; `WHOLE` -> where the experiment was made.

    A function counts where it is defined; anything else, and a function of a library, where it is handed over. What
    cannot be found is left out: a lambda of an interactive session, an experiment that a function returned.
    """
    found = _written(experiment)
    for part in PARTS:
        value = getattr(experiment, part)
        own = _defined(value) if callable(value) else None
        if own is not None:
            found[part] = own
    return found


def _defined(value: object) -> Place | None:
    """Where the code of something that can be called begins, where that is the user's own."""
    while isinstance(value, functools.partial):
        value = value.func
    if not isinstance(value, type) and not inspect.isroutine(value):
        value = type(value)
    try:
        value = inspect.unwrap(value) if callable(value) else value
        file = inspect.getsourcefile(value)  # type: ignore[arg-type]  # anything else is a TypeError
        _, line = inspect.getsourcelines(value)  # type: ignore[arg-type]
    except (OSError, TypeError, ValueError, SyntaxError):
        return None
    if file is None or not is_user_code(file) or not Path(file).is_file():
        return None
    return Place(str(Path(file).resolve()), max(line, 1))


def _written(experiment: Experiment) -> dict[str, Place]:
    """The assignment of the experiment in its module, and the arguments that it was made with."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not is_user_code(file):
            continue
        names = [name for name, value in list(vars(module).items()) if value is experiment]
        # Where it was imported to, it is not assigned.
        for name in names:
            if found := _assigned(file, name):
                return found
    return {}


def _assigned(file: str, name: str) -> dict[str, Place]:
    try:
        body = ast.parse(Path(file).read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return {}
    path = str(Path(file).resolve())
    for node in reversed(body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if not any(isinstance(target, ast.Name) and target.id == name for target in targets):
            continue
        found = {WHOLE: Place(path, node.lineno)}
        value = getattr(node, "value", None)
        if isinstance(value, ast.Call):
            found |= {key.arg: Place(path, key.value.lineno) for key in value.keywords if key.arg in PARTS}
        return found
    return {}
