"""Whether the pieces are terms of a sum or mean, or copies of the whole times a factor, which look much alike."""

from __future__ import annotations

from dataclasses import replace

from shardproof.compare.infer import scaled, sums
from shardproof.compare.infer.case import Case
from shardproof.compare.infer.inferred import Inferred
from shardproof.compare.infer.placed import Places
from shardproof.compare.measure import within


def summed(case: Case) -> Inferred | None:
    """Terms of sums, of the whole or of parts of it; None where they are not."""
    fitting: list[Inferred] = []
    whole_shaped = case.whole_shaped
    for groups in sums.groupings(list(case.pieces), case.known):
        if all(len(group) == 1 for group in groups):
            continue
        found = _of_whole(case, groups) if whole_shaped else _of_parts(case, groups)
        if found is not None:
            fitting.append(found)
        # Parts of sums are looked for no further: they cost a search each.
        if fitting and not whole_shaped:
            break
    if not fitting:
        return None
    first = fitting[0]
    multiple = scaled.factor_of(case.pieces, case.whole, case.floor) if whole_shaped else None
    if multiple is not None:
        # Equal terms: who holds a fraction of the whole need not know of any sum.
        return _times(case, *multiple, also=(first.text,))
    if len(fitting) > 1:
        reason = "several groups of ranks add up to the whole: some terms are alike, or zero"
        return replace(first, alternatives=tuple(one.text for one in fitting[1:]), reason=reason)
    swapped = sums.interchangeable(case.pieces, first.sums, case.floor) if case.known is None else None
    if swapped is not None and not first.alternatives:
        reason = f"ranks {swapped[0]} and {swapped[1]} hold the same term, so that either may belong to a group"
        return replace(first, alternatives=("the same terms, grouped otherwise",), reason=reason)
    return first


def _of_whole(case: Case, groups: sums.Groups) -> Inferred | None:
    error = sums.error_of_groups(case.pieces, case.whole, groups, case.floor)
    if not within(error, case.floor):
        return None
    return case.made(kind="partial", text=sums.named(groups), sums=groups, groups=(tuple(case.pieces),), error=error)


def _of_parts(case: Case, groups: sums.Groups) -> Inferred | None:
    totals = sums.added(case.pieces, groups)
    if totals is None:
        return None
    placed = Places(case.whole, case.floor).read(totals, [list(totals)])
    if placed is None or placed.misfit:
        return None
    # All ranks of a group hold terms of the same part.
    first = {rank: group[0] for group in groups for rank in group}
    cuts = tuple(replace(c, index={rank: c.index[first[rank]] for rank in case.pieces}) for c in placed.cuts)
    placed = replace(placed, cuts=cuts)
    alternatives, reason = case.open(placed)
    return case.made(
        kind="partial",
        text=f"{placed.text}, {sums.named(groups)}",
        cuts=cuts,
        sums=groups,
        groups=case.holders(placed),
        error=placed.error,
        alternatives=alternatives,
        reason=reason,
    )


def mean(case: Case) -> Inferred | None:
    """Terms of a mean of the whole; None where they are not."""
    if not case.whole_shaped:
        return None
    for groups in sums.groupings(list(case.pieces), case.known):
        error = sums.error_of_groups(case.pieces, case.whole, groups, case.floor, mean=True)
        if max(map(len, groups)) > 1 and within(error, case.floor):
            text, ranks = sums.named(groups, mean=True), tuple(case.pieces)
            return case.made(kind="mean", text=text, sums=groups, groups=(ranks,), error=error)
    return None


def multiple(case: Case) -> Inferred | None:
    """Copies times one factor; None where they are not."""
    found = scaled.factor_of(case.pieces, case.whole, case.floor) if case.whole_shaped else None
    return None if found is None else _times(case, *found, also=())


def _times(case: Case, factor: float, error: float, *, also: tuple[str, ...]) -> Inferred:
    return case.made(
        kind="scaled",
        text=f"copies, {factor:.6g} times as large",
        factor=factor,
        groups=(tuple(case.pieces),),
        error=error,
        alternatives=also,
        reason="equal terms add up to the whole as well" if also else "",
    )
