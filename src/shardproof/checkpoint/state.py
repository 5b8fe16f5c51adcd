"""What a checkpoint holds of a model: parameters and persistent buffers, by canonical name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardproof.checkpoint.index import Index
from shardproof.checkpoint.placed import Placed
from shardproof.checkpoint.portion import Portion
from shardproof.errors import CheckpointError
from shardproof.parallel import piece
from shardproof.parallel.held import plain
from shardproof.parallel.names import canonical_modules, join

MODEL, BUFFER, OPTIMIZER = "model/", "buffer/", "optimizer/"
"""What the names of parameters, buffers and optimizer state begin with in a checkpoint."""

SHOWN = 4
"""Names that an error lists of each kind."""


def model_portions(root: nn.Module, parameters: Iterable[Placed], *, rank: int) -> dict[str, Portion]:
    """Parameters and persistent buffers, by their names in a checkpoint. They share the model's memory."""
    portions = {MODEL + placed.name: placed.portion(placed.held.leaf) for placed in parameters}
    for name, buffer in persistent_buffers(root):
        local = plain(buffer.detach())
        # Running statistics differ between ranks that read different data; the first rank's are what DDP broadcasts.
        writes = isinstance(buffer, DTensor) or rank == 0
        portions[BUFFER + name] = Portion(piece.of_tensor(buffer), local, writes)
    return portions


def persistent_buffers(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, buffer) of every buffer that a `state_dict` would hold."""
    for prefix, module in canonical_modules(root):
        for name, buffer in module._buffers.items():
            if isinstance(buffer, Tensor) and name not in module._non_persistent_buffers_set:
                yield join(prefix, name), buffer


def check_model(portions: Mapping[str, Portion], index: Index, where: str) -> None:
    """Raise `CheckpointError` unless a checkpoint is of this model: the same names, the same shapes."""
    saved = {name: entry.shape for name, entry in index.tensors.items() if not name.startswith(OPTIMIZER)}
    check_shapes({name: portion.piece.whole for name, portion in portions.items()}, saved, where)


def check_shapes(
    want: Mapping[str, tuple[int, ...]], saved: Mapping[str, tuple[int, ...]], where: str, *, among: str = "the model"
) -> None:
    """Raise `CheckpointError` that names a few of the names and shapes in which `want` and `saved` differ."""
    shapes = [
        f"{name} {saved[name]} against {want[name]}" for name in want if name in saved and saved[name] != want[name]
    ]
    differences = {
        "not in the checkpoint": [name for name in want if name not in saved],
        f"not in {among}": [name for name in saved if name not in want],
        f"of other shapes (checkpoint against {among})": shapes,
    }
    told = [f"{len(names)} {kind}: {some(names)}" for kind, names in differences.items() if names]
    if told:
        raise CheckpointError(
            f"{where} is of another model than this one; build the model that was saved. " + "; ".join(told)
        )


def some(names: Iterable[str]) -> str:
    """A few of the names, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
