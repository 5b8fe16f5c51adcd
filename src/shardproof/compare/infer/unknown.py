"""Pieces that no reading explains: what is wrong with them, or how far off the nearest reading is."""

from __future__ import annotations

import math
from dataclasses import replace

from shardproof.compare.infer import sums
from shardproof.compare.infer.case import ANY_ORDER, Case
from shardproof.compare.infer.inferred import Inferred
from shardproof.compare.infer.placed import Placed, cut_dims
from shardproof.compare.infer.residual import error_of, floors, largest_of
from shardproof.compare.layouts import in_order, split_dim


def odd(case: Case) -> Inferred | None:
    """The answer where there is nothing that the pieces could be held against; None where there is."""
    for rank, piece in case.pieces.items():
        if piece.is_floating_point() and bool(piece.isnan().any()):
            return case.nowhere(f"rank {rank} holds NaN", math.nan)
    if case.whole.is_floating_point() and bool(case.whole.isnan().any()):
        return case.nowhere("the whole holds NaN", math.nan)
    if cut_dims(case.pieces, case.whole) is None:
        shapes = ", ".join(sorted({str(tuple(piece.shape)) for piece in case.pieces.values()}))
        return case.nowhere(f"{shapes} are no parts of {tuple(case.whole.shape)}", math.inf)
    if not case.whole.numel():
        return case.nowhere("the whole has no elements", math.inf)
    return None


def nearest(case: Case, placed: Placed | None) -> Inferred:
    """The nearest reading; `placed` is one whose values are right, but which makes up no whole."""
    if placed is not None:
        text = f"unknown; right values, but {placed.misfit}"
        found = case.nowhere(placed.misfit, floors(placed.error, case.floor), text)
        if placed.elsewhere:
            # Which of several like places a piece lies in was a guess, and may have been a wrong one.
            return replace(found, alternatives=(ANY_ORDER,), reason=f"{placed.misfit}, if parts alike were told apart")
        return found
    near = _near(case)
    if not near:
        return case.nowhere("some rank's values occur nowhere in the whole", math.inf)
    text = min(near, key=lambda name: near[name])
    away = floors(near[text], case.floor)
    reason = f"no reading fits; {text} would be {away:.3g} noise floors away"
    return case.nowhere(reason, away, f"unknown; nearest: {text}")


def _near(case: Case) -> dict[str, float]:
    """Readings in words -> how far off they are."""
    tensors = list(case.pieces.values())
    if case.whole_shaped:
        together = error_of(tensors, case.whole)
        if sums.one_vector_more(case.pieces, case.whole, case.floor):
            return {"partial sums over all ranks, each with a whole bias": together}
        apart = largest_of([error_of([piece], case.whole) for piece in tensors])
        return {"replicated": apart, "partial sums over all ranks": together}
    dim = split_dim(tensors, tuple(case.whole.shape))
    if dim is None:
        return {}
    wants = in_order(tensors, case.whole, dim)
    return {f"slices of dim {dim}": largest_of([error_of([g], w) for g, w in zip(tensors, wants, strict=True)])}
