"""Load a checkpoint, under whatever layout, into a model that has been laid out already."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.optim import Optimizer

from shardproof.checkpoint import folder
from shardproof.checkpoint import index as indices
from shardproof.checkpoint import optimizer as optimizers
from shardproof.checkpoint.index import Index
from shardproof.checkpoint.optimizer import Restoring
from shardproof.checkpoint.placed import Declared, Placed, placed
from shardproof.checkpoint.plain import decode
from shardproof.checkpoint.planning import ReadPlanner
from shardproof.checkpoint.portion import Portion
from shardproof.checkpoint.reader import READ_ERRORS, FolderReader, sliced
from shardproof.checkpoint.save import alone, finish_pending, told
from shardproof.checkpoint.state import BUFFER, MODEL, check_model, check_shapes, model_portions
from shardproof.checkpoint.stream import REAL
from shardproof.checkpoint.together import from_first, own_group, together
from shardproof.errors import CheckpointError
from shardproof.parallel.gathered import let_go
from shardproof.parallel.held import Held, ties


def load(
    path: str | os.PathLike[str],
    root: nn.Module,
    parameters: Iterable[Held],
    optimizer: Optimizer | None,
    *,
    declared: Declared | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Read a checkpoint into the live model and optimizer, in place, and return the `extra` that was saved with it.

    All ranks call it; each reads only what it holds. `path` is a checkpoint, or a folder of checkpoints, of which the
    newest is taken. With `optimizer` None the model alone is read. Values are cast to the live dtypes.

    Raises `CheckpointError` on every rank: before anything is written where the checkpoint is of another model or
    optimizer, or files are missing; where a file turns out to be damaged later, the model is half overwritten.
    """
    finish_pending()
    group = own_group() if group is None else group
    # One rank looks, so that all of them load the same checkpoint.
    found, index = from_first(lambda: _opened(path), group)
    let_go(root)
    portions, restoring = together(
        lambda: _prepared(root, placed(parameters, declared), optimizer, index, str(found)), group
    )
    try:
        with alone(group), torch.no_grad():
            torch_load(
                dict(portions),
                storage_reader=FolderReader(found, index),
                planner=ReadPlanner(),
                process_group=group,
                no_dist=group is None,
            )
    except CheckpointException as failed:
        raise told(failed) from failed
    if restoring is not None:
        restoring.finish()
    return together(lambda: _extra(index, found), group)


def read_extra(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `extra` of a checkpoint, without reading any tensor. Raises `CheckpointError`."""
    found, index = _opened(path)
    return _extra(index, found)


def load_weights(
    path: str | os.PathLike[str],
    root: nn.Module,
    parameters: Iterable[Held],
    *,
    declared: Declared | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Read a `.safetensors` file of whole tensors under canonical names into the live model, buffers included.

    All ranks call it; each reads only the slices that it holds. A tied parameter may be there under any of its names.
    Raises `CheckpointError` on every rank.
    """
    finish_pending()
    group = own_group() if group is None else group
    let_go(root)
    together(lambda: _read_weights(Path(path), root, placed(parameters, declared)), group)


def _opened(path: str | os.PathLike[str]) -> tuple[Path, Index]:
    found = folder.resolve(path).absolute()
    return found, indices.read(found)


def _extra(index: Index, path: Path) -> dict[str, Any]:
    extra = decode(index.extra)
    if not isinstance(extra, dict):
        raise CheckpointError(f"{path}: the index holds no `extra`; it is damaged, load an earlier checkpoint")
    return extra


def _prepared(
    root: nn.Module, parameters: list[Placed], optimizer: Optimizer | None, index: Index, where: str
) -> tuple[Mapping[str, Portion], Restoring | None]:
    portions = model_portions(root, parameters, rank=0)
    check_model(portions, index, where)
    if optimizer is None:
        return portions, None
    restoring = optimizers.restore(optimizer, parameters, index, where)
    return portions | restoring.portions, restoring


def _read_weights(path: Path, root: nn.Module, parameters: list[Placed]) -> None:
    portions = model_portions(root, parameters, rank=0)
    wanted = {name.removeprefix(MODEL).removeprefix(BUFFER): portion for name, portion in portions.items()}
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a .safetensors file of whole weights")
    try:
        with safe_open(path, framework="pt") as file:
            keys = _keys(list(file.keys()), wanted, ties(root))
            shapes = {name: tuple(file.get_slice(key).get_shape()) for name, key in keys.items()}
            whole = {name: _stored_shape(portion) for name, portion in wanted.items()}
            check_shapes(whole, shapes, str(path))
            with torch.no_grad():
                for name, portion in wanted.items():
                    for box in portion.boxes():
                        view = portion.view(box)
                        view.copy_(sliced(file, keys[name], view.dtype, box.offset, box.shape))
    except READ_ERRORS as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {error}; export or download it again") from error


def _stored_shape(portion: Portion) -> tuple[int, ...]:
    return (*portion.piece.whole, 2) if portion.local.dtype in REAL else portion.piece.whole


def _keys(there: list[str], wanted: Mapping[str, Portion], tied: tuple[tuple[str, ...], ...]) -> dict[str, str]:
    """Name in the model, or in the file where the model has none of it -> name in the file."""
    keys = {key: key for key in there}
    for group in tied:
        own = next((name for name in group if name in wanted), None)
        found = [keys.pop(name) for name in group if name in keys]
        if own is not None and found:
            keys[own] = found[0]
    return keys
