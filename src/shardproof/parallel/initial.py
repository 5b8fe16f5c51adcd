"""Build the unsharded model, the same on every rank and under every strategy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from shardproof.errors import ExperimentError
from shardproof.parallel.seeding import seed_everything
from shardproof.spec.experiment import Experiment


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Floating tensors are made in `dtype` inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(experiment: Experiment, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The whole model with its initial weights, drawn under the experiment's seed, in `dtype` on `device`.

    Raises `ExperimentError` where what it returns is no model, or has nothing to train.
    """
    seed_everything(experiment.seed)
    if isinstance(experiment.model, nn.Module):
        raise ExperimentError(
            f"Experiment.model is a {type(experiment.model).__name__} that is already built; "
            "pass a function that builds one, so that every run starts from the same weights"
        )
    model = experiment.model()
    if not isinstance(model, nn.Module):
        raise ExperimentError(f"Experiment.model returned {type(model).__name__}; it must return an nn.Module")
    parameters = list(model.parameters())
    if not parameters:
        raise ExperimentError(
            f"the model ({type(model).__name__}) has no parameters; Experiment.model must build one that can be trained"
        )
    if not any(parameter.requires_grad for parameter in parameters):
        raise ExperimentError(
            f"none of the model's {len(parameters)} parameters requires a gradient; leave at least one trainable"
        )
    return cast_model(model, dtype).to(device)


def cast_model(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model` with its floating parameters and buffers in `dtype`, in place; complex ones (rotary embeddings) in the
    complex type of that width, where `Module.to` would drop their imaginary parts."""
    model._apply(lambda t: t.to(numbers(t.dtype, dtype)))  # type: ignore[no-untyped-call]
    return model


def numbers(own: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """What a tensor of dtype `own` is cast to in a run in `dtype`: whole numbers and booleans stay what they are."""
    if own.is_complex:
        return torch.complex128 if dtype == torch.float64 else torch.complex64
    return dtype if own.is_floating_point else own
