"""Find the Experiment that `path/to/file.py[:name]` or `package.module:name` stands for."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from shardproof.errors import ExperimentError
from shardproof.spec.experiment import Experiment
from shardproof.spec.strategies import suggest
from shardproof.spec.training import Training

DEFAULT_NAME = "experiment"
"""The name looked for in a file when none is given and it holds several experiments."""

TRAINING_NAME = "training"
"""The name under which a file may keep a `Training` for its experiments."""


def load(target: str) -> Experiment:
    """The experiment that `target` names: `path/to/file.py[:name]` or `package.module:name`.

    Without a name, a file's `experiment`, or its only Experiment, is taken. The folder of the file (or the current
    folder, for a module) becomes importable. Raises `ExperimentError` for whatever goes wrong on the way.
    """
    module, name = _module(target)
    return _pick(module, name, target)


def load_for_training(target: str) -> tuple[Experiment, Training]:
    """The experiment that `target` names, and how its file says to train it: its `training`, where it has one.

    Raises `ExperimentError` as `load` does, and where `training` is no Training.
    """
    module, name = _module(target)
    experiment = _pick(module, name, target)
    training = getattr(module, TRAINING_NAME, None)
    if training is None or isinstance(training, ModuleType):
        return experiment, Training()
    if not isinstance(training, Training):
        raise ExperimentError(
            f"{target}: {TRAINING_NAME} is a {type(training).__name__}; make it a shardproof.Training(...)"
        )
    return experiment, training


def _module(target: str) -> tuple[ModuleType, str]:
    place, _, name = target.rpartition(":") if ":" in target else (target, "", "")
    # A Windows drive or a plain path has no name behind its colon.
    if not place or name.endswith(".py") or "/" in name or "\\" in name:
        place, name = target, ""
    if not place:
        raise ExperimentError(f"{target!r} names nothing; write path/to/file.py[:name] or package.module:name")
    module = _from_file(Path(place)) if place.endswith(".py") or "/" in place else _from_module(place)
    return module, name


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ExperimentError(_no_such_file(path))
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # A file called json.py must not replace the module of that name that is already loaded.
    name = path.stem if path.stem not in sys.modules else f"shardproof_experiment_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise ExperimentError(f"{path}: not a Python file; name a .py file")
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs, as import does: dataclasses and pickle look their module up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        if not isinstance(error, Exception | SystemExit):
            raise
        raise ExperimentError(_failed_import(str(path), error, path.resolve())) from error
    return module


def _from_module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ExperimentError(
                f"{name}: there is no such module or file; write path/to/file.py[:name] or package.module:name"
            ) from error
        raise ExperimentError(_failed_import(name, error, None)) from error
    except Exception as error:
        raise ExperimentError(_failed_import(name, error, None)) from error


def _pick(module: ModuleType, name: str, target: str) -> Experiment:
    found = {key: value for key, value in vars(module).items() if isinstance(value, Experiment)}
    if name:
        if name in found:
            return found[name]
        if hasattr(module, name):
            raise ExperimentError(
                f"{target}: {name} is a {type(getattr(module, name)).__name__}, not an Experiment; "
                f"Experiments there: {', '.join(found) or 'none'}"
            )
        raise ExperimentError(f"{target}: there is no {name!r} there; {suggest(name, found)}")
    if DEFAULT_NAME in found:
        return found[DEFAULT_NAME]
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise ExperimentError(f"{target}: holds {len(found)} Experiments; name one, as {target}:{next(iter(found))}")
    raise ExperimentError(f"{target}: holds no Experiment; write `experiment = shardproof.Experiment(...)` in it")


def _no_such_file(path: Path) -> str:
    folder = path.parent
    near = sorted(entry.name for entry in folder.glob("*.py")) if folder.is_dir() else []
    if not folder.is_dir():
        return f"{path}: there is no folder {folder}"
    return f"{path}: there is no such file; {suggest(path.name, near)}"


def _failed_import(place: str, error: BaseException, file: Path | None) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if file is None or Path(frame.filename) == file]
    at = f"{own[-1].filename}:{own[-1].lineno}" if own and file is not None else place
    if isinstance(error, SyntaxError) and error.filename:
        at = f"{error.filename}:{error.lineno}"
    return f"{place}: importing it failed at {at}: {type(error).__name__}: {error}"
