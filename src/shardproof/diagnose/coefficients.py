"""Write what each rank holds as a combination of what each micro-batch of each data rank contributes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardproof.compare.measure import MULTIPLE, largest
from shardproof.compare.verdict import Comparison
from shardproof.diagnose.case import Case
from shardproof.train.contributions import Contribution

EQUATIONS = 4096
"""Elements of a rank's gradients from which coefficients are fitted; all elements are held against them."""

EXACT = 1e-12
"""Of a gradient's largest element: what contributions in float64 may leave of their sum."""

UNTOLD = 0.2
"""A coefficient that is not known to within this (relative) names nothing."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The coefficients of one set of gradients, as multiples of the right ones."""

    parts: Sequence[Contribution]
    """Those that contribute anything to these gradients."""
    expected: Tensor
    """`(parts,)`: the share of each part in the right gradient; they sum to 1 for a mean."""
    of_rank: Mapping[int, Tensor]
    """Rank -> `(parts,)`: coefficient over the right one."""
    tolerance: Tensor
    """`(parts,)`: how well those are known."""
    residual: float
    """What the coefficients leave unexplained, in noise floors."""
    names: Sequence[str]


def fitted(case: Case, wrong: Sequence[Comparison]) -> Fitted | None:
    """Coefficients for all of these gradients at once; None where they explain nothing or cannot be told."""
    parts = [
        p for p in case.contributions if any(bool(p.gradients[c.name].any()) for c in wrong if c.name in p.gradients)
    ]
    equations = _Equations.of(case, wrong, parts)
    if equations is None:
        return None
    expected = equations.expected()
    if expected is None or not bool((expected.abs() > 1e-9).all()):
        return None
    of_rank: dict[int, Tensor] = {}
    worst, tolerance = 0.0, torch.zeros(len(parts), dtype=torch.float64)
    for rank in equations.ranks:
        solved = equations.solve(equations.got[rank], rank)
        if solved is None:
            return None
        coefficients, spread = solved
        residual = equations.residual(equations.got[rank], rank, coefficients)
        size = max(float((coefficients / expected).abs().max()), 1.0)
        worst = max(worst, residual / size)
        of_rank[rank] = coefficients / expected
        tolerance = torch.maximum(tolerance, spread / expected.abs() + 1e-6 * size)
    if not bool((tolerance < UNTOLD).all()):
        return None
    return Fitted(
        parts=parts,
        expected=expected,
        of_rank=of_rank,
        tolerance=tolerance,
        residual=worst,
        names=[c.name for c in wrong],
    )


def splits(case: Case) -> bool:
    """Whether the reference's gradients are a weighted sum of what the parts of the batch contribute.

    Those of a loss that compares samples with each other (in-batch negatives) are not.
    """
    gradients = [c for c in case.comparisons if (c.step, c.stage) == (case.first.step, "gradient") and c.floor > 0]
    # Each addend of a loss may count something of its own.
    terms = [replace(part, gradients=term) for part in case.contributions for term in part.terms]
    for every in (case.contributions, terms):
        parts = [part for part in every if any(bool(gradient.any()) for gradient in part.gradients.values())]
        equations = _Equations.of(case, gradients, parts)
        if equations is not None and equations.expected() is not None:
            return True
    return False


def mixed_pieces(case: Case) -> dict[int, list[tuple[int, float]]] | None:
    """Rank -> (rank whose piece it should be, coefficient), where each holds right gradients of several pieces.

    None where the first wrong gradient is not made up so, or is not cut into pieces.
    """
    held = case.shares(case.first)
    want = case.reference.tensors(case.first.key)
    parts = [p for p in case.contributions if case.first.name in p.gradients]
    places = {share.place: share for share in reversed(held)}
    if not want or not parts or len(places) < 2:
        return None
    found: dict[int, list[tuple[int, float]]] = {}
    worst = 0.0
    for share in held:
        peers = [places[share.place], *(o for place, o in places.items() if place != share.place)]
        alike = [o for o in peers if o.got.shape == share.got.shape]
        columns = [(o.rank, o.take(p.gradients[case.first.name])) for o in alike for p in parts]
        basis = torch.stack([column for _, column in columns], 1)
        if len(basis) < 2 * basis.shape[1] or not bool(basis.isfinite().all() and share.got.isfinite().all()):
            return None
        solved = torch.linalg.lstsq(basis, share.got.unsqueeze(1), driver="gelsd").solution[:, 0]
        worst = max(worst, largest((share.got - basis @ solved).abs()) / (case.first.floor or 1.0))
        found[share.rank] = [(rank, float(c)) for (rank, _), c in zip(columns, solved, strict=True)]
    limit = max(MULTIPLE * 4, 1e-8 * case.first.error / (case.first.floor or 1.0))
    return found if case.fits("gradients of several ranks' pieces mixed", worst, limit=limit) else None


@dataclass(frozen=True, kw_only=True)
class _Equations:
    """Per rank: the elements it holds, in units of their noise floors, beside those of the contributions."""

    ranks: Sequence[int]
    got: Mapping[int, Tensor]
    want: Mapping[int, Tensor]
    basis: Mapping[int, Tensor]
    """Rank -> `(elements, parts)`."""
    shares: Tensor
    """`(parts,)`: counts over their sum."""

    @classmethod
    def of(cls, case: Case, wrong: Sequence[Comparison], parts: Sequence[Contribution]) -> _Equations | None:
        if not parts:
            return None
        got: dict[int, list[Tensor]] = {}
        want: dict[int, list[Tensor]] = {}
        basis: dict[int, list[Tensor]] = {}
        for comparison in wrong:
            whole = case.reference.tensors(comparison.key)
            held = case.shares(comparison)
            if not whole or not held:
                return None
            zero = torch.zeros_like(whole[0])
            columns = [part.gradients.get(comparison.name, zero) for part in parts]
            for share in held:
                if not share.got.numel():
                    continue
                if not bool(share.got.isfinite().all()):
                    return None
                unit = comparison.floor or 1.0
                got.setdefault(share.rank, []).append(share.got / unit)
                want.setdefault(share.rank, []).append(share.take(whole[0]) / unit)
                taken = torch.stack([share.take(column.to(torch.float64)) for column in columns], 1)
                basis.setdefault(share.rank, []).append(taken / unit)
        counts = torch.tensor([part.count for part in parts], dtype=torch.float64)
        every = sum(part.count for part in case.contributions)
        return cls(
            ranks=sorted(got),
            got={rank: torch.cat(own) for rank, own in got.items()},
            want={rank: torch.cat(own) for rank, own in want.items()},
            basis={rank: torch.cat(own) for rank, own in basis.items()},
            shares=counts / max(every, 1.0),
        )

    def expected(self) -> Tensor | None:
        """The share of each part in the reference: by its count, or fitted where the loss counts something else."""
        rank = max(self.ranks, key=lambda r: len(self.got[r]))
        # Beside the floor, as the contributions were rounded otherwise than their sum.
        limit = max(MULTIPLE, EXACT * largest(self.want[rank].abs()))
        if self.residual(self.want[rank], rank, self.shares) <= limit:
            return self.shares
        solved = self.solve(self.want[rank], rank)
        if solved is None or not self.residual(self.want[rank], rank, solved[0]) <= limit:
            return None
        return solved[0]

    def solve(self, values: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
        """Least squares: coefficients and how well each is known; None where the parts cannot be told apart."""
        basis = self.basis[rank]
        if len(values) > EQUATIONS:
            chosen = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))[:EQUATIONS]
            # The largest elements tell most, wherever they are.
            chosen = torch.cat([chosen, values.abs().topk(EQUATIONS // 4).indices])
            values, basis = values[chosen], basis[chosen]
        # As many numbers as parts can be written so whatever they are.
        if len(values) < 2 * basis.shape[1]:
            return None
        scale = basis.norm(dim=0)
        if not bool((scale > 0).all()):
            return None
        left, singular, right = torch.linalg.svd(basis / scale, full_matrices=False)
        if not float(singular[-1]) > 1e-8 * float(singular[0]):
            return None
        inverse = right.T / singular
        coefficients = (inverse @ (left.T @ values)) / scale
        # Each equation is known to within a few noise floors, of which it is written in units.
        return coefficients, 3.0 * inverse.norm(dim=1) / scale

    def residual(self, values: Tensor, rank: int, coefficients: Tensor) -> float:
        """Largest |value - combination|, in noise floors."""
        far = largest((values - self.basis[rank] @ coefficients).abs())
        return far if math.isfinite(far) else math.inf
