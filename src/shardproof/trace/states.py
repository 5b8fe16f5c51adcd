"""What an optimizer step leaves behind on this rank: optimizer state, weights, buffers, and where each of them lies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardproof.parallel import piece
from shardproof.parallel.held import Held, plain
from shardproof.parallel.names import canonical_buffers
from shardproof.parallel.piece import Piece

State = tuple[str, str, str, Tensor, Piece | None]
"""Stage, name, part, tensor and where it lies."""

CAUSES = {"update": 0, "buffer": 1, "optimizer-state": 2}
"""Stages of a state, in the order in which a wrong one spreads from before the first step."""

LOSSES = frozenset({"prev_loss"})
"""What LBFGS keeps of its closure's loss, to know when to stop: on a data rank that is the loss of its own part, which
is right to differ from those of others. Losses have a stage of their own."""


def optimizer_state(parameters: Iterable[Held], optimizer: Optimizer) -> Iterator[State]:
    """What `optimizer` remembers of each of these parameters; a number is shown as a tensor of shape ()."""
    for held in parameters:
        if 0 in held.piece.local_shape:
            # Of a parameter of which this rank holds nothing, it need not count steps either.
            continue
        for key, value in optimizer.state.get(held.leaf, {}).items():
            if key in LOSSES:
                continue
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape == held.leaf.shape:
                yield "optimizer-state", held.name, key, held.local(value), held.piece_of(value)
            elif isinstance(value, int | float | Tensor):
                # Of another shape than its parameter (a factored moment): whole only if the parameter is.
                scalar = torch.as_tensor(value) if not isinstance(value, Tensor) else value
                whole = scalar.dim() == 0 or held.piece.local_shape == held.piece.whole
                where = piece.of_tensor(scalar) if whole or isinstance(scalar, DTensor) else None
                yield "optimizer-state", held.name, key, scalar, where


def weights(parameters: Iterable[Held]) -> Iterator[State]:
    """The values of these parameters."""
    for held in parameters:
        yield "update", held.name, "", held.local(held.leaf), held.piece


def buffers(model: nn.Module) -> Iterator[State]:
    """Every buffer of `model`, those that are not saved included."""
    for name, buffer in canonical_buffers(model):
        if isinstance(buffer, Tensor):
            yield "buffer", name, "", buffer, piece.of_tensor(buffer)


def as_kept(tensor: Tensor) -> Tensor:
    """What this rank holds of `tensor`, in the one form that is written and compared: dense, complex as pairs of reals.

    A view where it can be one. safetensors knows neither sparse tensors nor complex numbers, and a distance is a real
    number.
    """
    tensor = plain(tensor.detach())
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
