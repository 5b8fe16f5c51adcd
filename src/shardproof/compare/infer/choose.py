"""Ask every kind of layout whether it explains the values, the simplest first, and say what else would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from shardproof.compare.infer import hinted, terms, unknown
from shardproof.compare.infer.case import Case
from shardproof.compare.infer.inferred import Inferred
from shardproof.compare.infer.placed import Placed, Places


def infer(
    pieces: Mapping[int, Tensor],
    whole: Tensor,
    floor: float,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    hint: Mapping[str, object] | None = None,
) -> Inferred:
    """How the ranks' plain tensors make up `whole`, told by their values.

    `pieces` maps ranks (or the numbers of parts of a batch) to what each holds, real numbers, in host memory as
    `whole` is; `floor` is how far rounding may move an element, in the tensor's own unit. `groups` are sets of ranks
    each of which is known to make up the whole by itself; otherwise they are found. `hint` is `{"replicated": True}`,
    `{"dim": 0}` or `{"fused": [64, 16, 16]}` (with its dim, 0 unless said): it decides where the values leave a choice,
    and is contradicted where they do not bear it out.

    Nothing is guessed silently: readings that fit as well are listed, and NaN fits nowhere.
    Raises `ValueError` for no pieces, groups that are not the ranks, or a hint that makes no sense.
    """
    if not pieces:
        raise ValueError("there are no pieces to infer a layout from")
    if groups is not None and sorted(rank for group in groups for rank in group) != sorted(pieces):
        raise ValueError(f"groups {[list(group) for group in groups]} are not the ranks {sorted(pieces)}, each once")
    pieces = {rank: pieces[rank].detach() for rank in sorted(pieces)}
    whole = whole.detach()
    said = hinted.said(hint, whole) if hint else ""
    case = Case(pieces=pieces, whole=whole, floor=floor, known=groups)
    if whole.dim() > 1 and all(piece.dim() == 1 for piece in pieces.values()):
        flat = _read(replace(case, whole=whole.reshape(-1)))
        text = flat.text.replace("dim 0", "the flattened tensor")
        contradicts = f"the hint says {said}, but the pieces have one dim" if said else ""
        return replace(flat, shape=tuple(whole.shape), flat=True, text=text, contradicts=contradicts)
    return _hinted(case, hint, said) if hint else _read(case)


def _read(case: Case) -> Inferred:
    """The simplest reading that fits."""
    odd = unknown.odd(case)
    if odd is not None:
        return odd
    places = Places(case.whole, case.floor)
    placed = places.read(case.pieces, case.groups)
    if placed is not None and not placed.misfit:
        return case.placed(placed)
    for kind in (terms.summed, terms.mean, terms.multiple):
        found = kind(case)
        if found is not None:
            return found
    return _reordered(case, places) or unknown.nearest(case, placed)


def _reordered(case: Case, places: Places) -> Inferred | None:
    """Whole tensors whose places along one dim are in another order: weights converted from elsewhere."""
    if not case.whole_shaped:
        return None
    for dim in range(case.whole.dim()):
        placed = places.anyhow(case.pieces, dim) if case.whole.shape[dim] > 1 else None
        if placed is not None and not placed.misfit:
            return case.placed(placed)
    return None


def _hinted(case: Case, hint: Mapping[str, object], said: str) -> Inferred:
    """The hint's reading where it fits, else the values' own."""
    odd = unknown.odd(case)
    if odd is not None:
        return odd
    read = hinted.read(hint, case.pieces, case.whole, case.floor, case.groups)
    if isinstance(read, Placed):
        # Somebody said so, and nothing speaks against it: no choice is open.
        return replace(case.placed(read), alternatives=(), reason="")
    found = _read(case)
    told = f"the values say {found.text}" if found.fits else "no other reading fits either"
    return replace(found, contradicts=f"the hint says {said}, but {read}; {told}")
