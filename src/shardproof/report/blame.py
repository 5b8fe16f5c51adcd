"""Which part of an experiment a cause concerns, so that an annotation points at code and not at a tensor."""

from __future__ import annotations

_LAYOUT = ("parallelize", "tp_plan", "model")
_REDUCTION = ("train_step", "parallelize", "tp_plan")
_WEIGHTING = ("train_step", "loss")
_READING = ("batches", "data")

BLAMED: dict[str, tuple[str, ...]] = {
    "strategy-not-applied": ("parallelize",),
    "batch-differs-in-group": _READING,
    "batch-repeated-across-dp": _READING,
    "data-order": _READING,
    "initial-state": ("parallelize", "model"),
    "forward-not-reduced": _LAYOUT,
    "bias-counted-k-times": _LAYOUT,
    "sharded-loss": ("loss",),
    "layout-permuted": _LAYOUT,
    "grad-not-reduced": _REDUCTION,
    "grad-not-summed": _REDUCTION,
    "grad-partly-reduced": _REDUCTION,
    "microbatch-misweighted": _WEIGHTING,
    "mean-of-means": _WEIGHTING,
    "grad-scale": _REDUCTION,
    "grad-scale-subset": _REDUCTION,
    "wrong-group": _REDUCTION,
    "tied-weights-split": _LAYOUT,
    "positions": ("batches", "model"),
    "attention-math": ("model",),
    "grad-norm": ("train_step", "max_grad_norm"),
    "precision": ("train_step", "parallelize", "model"),
    "overflow-not-shared": ("train_step",),
    "rng": ("model",),
    "buffers": ("model",),
    "optimizer": ("optimizer",),
    "checkpoint": (),
    "nondeterminism": ("model",),
    "unexplained": ("train_step", "parallelize"),
}
"""Cause -> fields of the experiment, the likeliest first; the first one that was given counts, else the experiment."""
