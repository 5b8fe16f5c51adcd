"""Two recordings made comparable: common names, common wholes, a common order of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

from shardproof.align import samples, shapes, understood
from shardproof.align.apart import Sets, sets_of_ranks, split_over
from shardproof.align.names import Rule, check, renamed, suggestions, without_prefix
from shardproof.align.side import Side
from shardproof.align.told import Told, told
from shardproof.align.traces import Aligned, Nothing
from shardproof.align.understood import Layout
from shardproof.compare.reads import Misread, understand
from shardproof.errors import TraceError
from shardproof.spec.parallelism import Parallelism
from shardproof.trace.folder.reader import Recording
from shardproof.trace.trace import Alike

FEWEST = 1024
"""One rank in so many has to be there: what a header says of its world costs as much to lay out as if it were so."""


@dataclass(kw_only=True)
class Pair:
    """What is held against what."""

    want: Side
    """The trusted run."""
    got: Side
    told: tuple[Mapping[int, Told], Mapping[int, Told]]
    """The facts of each side's ranks, by place on its mesh."""
    steps: tuple[int, ...]
    """Steps that both show, from the first on."""
    orders: Mapping[int, Sequence[int]]
    """Step -> for each sample of `got` its place in the order of `want`, where the orders differ."""
    misread: Misread | None
    """Where the two read other samples, or TP peers did."""
    unread: frozenset[int] = frozenset()
    """Steps from the first on in which not the same samples were read: their activations have nothing in common."""
    partial: Mapping[int, str] = field(default_factory=dict)
    """Step -> whose samples are not all known, in words: its activations and losses cannot be put together."""
    notes: list[str] = field(default_factory=list)
    suggested: tuple[Rule, ...] = ()


def pair(
    first: Recording,
    second: Recording,
    *,
    rules: Sequence[Rule] = (),
    layouts: tuple[Parallelism | None, Parallelism | None] = (None, None),
    labels: tuple[str, str] = ("A", "B"),
) -> Pair:
    """Bring two recordings together; `layouts` are what a reader declares of either, None where they tell themselves.

    Raises `UsageError` where the ranks of a side make up no mesh, and for rules that cannot be meant; `TraceError`
    where hardly any rank can be read.
    """
    for recording in (first, second):
        _check_ranks(recording)
    notes: list[str] = []
    if rules:
        as_it_is = _held(first, str), _held(second, str)
        check(rules, [*map(_names, (first, second))], as_it_is)
    rename: Callable[[str], str] = partial(renamed, rules=rules)
    held = _held(first, rename), _held(second, rename)
    names = [{name: h.shape for name, h in own.items()} for own in held]
    prefix = without_prefix(names[1], names[0]), without_prefix(names[0], names[1])
    renames = [rename, rename]
    for side, found in ((1, prefix[0]), (0, prefix[1])):
        if found is not None:
            notes.append(f"names of {labels[side]} are read without their prefix {found!r}")
            rule = Rule(left=f"{found}*", right="*")
            renames[side] = partial(_both, rename, rule)
    held = _held(first, renames[0]), _held(second, renames[1])
    facts = _facts(first, renames[0]), _facts(second, renames[1])
    worlds = first.world_size, second.world_size
    sets = sets_of_ranks(first.ranks, renames[0]), sets_of_ranks(second.ranks, renames[1])
    splits = (
        _peers(shapes.split(held[0], held[1], worlds[0]), split_over(sets[0], worlds[0]), worlds[0]),
        _peers(shapes.split(held[1], held[0], worlds[1]), split_over(sets[1], worlds[1]), worlds[1]),
    )
    layout = (
        _layout(first, facts[0], layouts[0], splits[0], "--layout-a"),
        _layout(second, facts[1], layouts[1], splits[1], "--layout-b"),
    )
    degrees = layout[0].parallelism.tp, layout[1].parallelism.tp
    apart = [name for name in sets[0] if len(sets[0][name]) > 1 and len(sets[1].get(name, ())) > 1]
    wholes = shapes.whole_shapes(held[0], held[1], degrees, worlds, apart)
    want = _side(first, labels[0], layout[0], renames[0], wholes)
    got = _side(second, labels[1], layout[1], renames[1], wholes)
    if want.reads.keys() & got.reads.keys() and not samples.shares_samples(want.reads, got.reads):
        found_reads = samples.by_content(want.traces, got.traces)
        if found_reads is not None:
            want.reads, got.reads = found_reads
            notes.append("samples are told apart by the values of one input, as the two models are fed other things")
    if want.reads and got.reads and not samples.same_samples(want.reads, got.reads):
        found_reads = samples.unpadded(want.traces, got.traces)
        if found_reads is not None:
            want.reads, got.reads = found_reads
            notes.append("samples are told apart without what they are padded with, as their lengths differ")
    shapes_of = [{name: h.shape for name, h in own.items()} for own in held]
    return _read(
        Pair(
            want=want,
            got=got,
            told=tuple(  # type: ignore[arg-type]  # two of them
                {place: own[rank] for place, rank in enumerate(at.order) if rank in own}
                for own, at in zip(facts, layout, strict=True)
            ),
            steps=_steps(want, got),
            orders={},
            misread=None,
            notes=notes,
            suggested=tuple(suggestions(shapes_of[1], shapes_of[0])),
        )
    )


def _both(rename: Callable[[str], str], rule: Rule, name: str) -> str:
    renamed_first = rename(name)
    return rule.apply(renamed_first) or renamed_first


def _held(recording: Recording, rename: Callable[[str], str]) -> dict[str, shapes.Held]:
    return shapes.held([recording.ranks[rank] for rank in sorted(recording.ranks)], rename)


def _facts(recording: Recording, rename: Callable[[str], str]) -> dict[int, Told]:
    return {rank: told(trace.events, rename) for rank, trace in recording.ranks.items()}


def _peers(split: int, seen: Sets, world_size: int) -> Sets:
    """The tensor-parallel groups of plain parameters: as their values show them, else neighbours, else none."""
    if seen and len(seen[0]) >= split:
        return seen
    return tuple(tuple(range(first, first + split)) for first in range(0, world_size, split)) if split > 1 else ()


def _check_ranks(recording: Recording) -> None:
    there, world_size = len(recording.ranks), recording.world_size
    if there * FEWEST < world_size:
        raise TraceError(
            f"{recording.path}: only {there} of {world_size} ranks can be read, too few to compare; "
            "give the directory that holds the files of all ranks"
        )


def _names(recording: Recording) -> set[str]:
    return {record.name for trace in recording.ranks.values() for record in trace.records}


def _layout(
    recording: Recording, facts: Mapping[int, Told], given: Parallelism | None, split: Sets, option: str
) -> Layout:
    path, world_size = str(recording.path), recording.world_size
    if given is not None:
        return understood.declared(given, world_size, path, option)
    groups = {rank: own.axes for rank, own in facts.items()}
    return understood.from_groups(groups, world_size, split=split, label=path, option=option)


def _side(
    recording: Recording,
    label: str,
    layout: Layout,
    rename: Callable[[str], str],
    wholes: Mapping[str, tuple[int, ...]],
) -> Side:
    # Hundreds of ranks show the same names.
    rename, alike = cache(rename), Alike()
    traces = [
        Aligned(trace, rename=rename, wholes=wholes, alike=alike)
        if (trace := recording.ranks.get(rank)) is not None
        else Nothing()
        for rank in layout.order
    ]
    return Side(label=label, traces=traces, layout=layout, reads=samples.reads_of(traces))


def _steps(want: Side, got: Side) -> tuple[int, ...]:
    shown = [
        {record.step for trace in side.traces for record in trace.records if record.step >= 0} for side in (want, got)
    ]
    return tuple(sorted(shown[0] & shown[1]))


def _read(pair: Pair) -> Pair:
    """Put together what both read: parts, orders, and what is wrong with them."""
    if _parts(pair.want, pair.steps) is not None:
        pair.notes.append(f"TP peers of {pair.want.label}, which is trusted, read different samples")
    pair.misread = _parts(pair.got, pair.steps)
    orders: dict[int, Sequence[int]] = {}
    unread: set[int] = set()
    labels = pair.want.label, pair.got.label
    partial: dict[int, str] = {}
    for step in pair.steps:
        want, got = pair.want.order(step), pair.got.order(step)
        silent = pair.want.silent(step), pair.got.silent(step)
        if any(silent):
            partial[step] = " and ".join(
                side.named(own) for side, own in zip((pair.want, pair.got), silent, strict=True) if own
            )
            if samples.may_agree(got, want, all_want=not silent[0], all_got=not silent[1]):
                continue
        if not want or not got:
            continue
        order = samples.places(got, want)
        if order is None or len(order) != len(want):
            unread.update(s for s in pair.steps if s >= step)
            wrong = samples.misread(pair.got.reads[step], want, pair.got.layout.parallelism, step=step, labels=labels)
            if pair.misread is None or pair.misread.step > step:
                pair.misread = wrong
            break
        if order != list(range(len(order))):
            orders[step] = order
    if pair.misread is not None:
        unread.update(s for s in pair.steps if s >= pair.misread.step)
    pair.orders, pair.unread, pair.partial = orders, frozenset(unread), partial
    return pair


def _parts(side: Side, steps: Sequence[int]) -> Misread | None:
    """Count a side's samples part by part; what is wrong with them among TP peers, if anything is."""
    known = [step for step in steps if len({len(parts) for parts in side.reads.get(step, [])}) == 1]
    if not known or any(not isinstance(trace, Aligned) for trace in side.traces):
        return None
    reads = [[side.reads[step][place] for step in known] for place in range(len(side.traces))]
    found = understand(reads, side.layout.parallelism, may_split=False, data=None)
    side.samples = {step: found.samples[number] for number, step in enumerate(known)}
    if found.misread is None:
        return None
    return _at_step(found.misread, known[found.misread.step])


def _at_step(misread: Misread, step: int) -> Misread:
    return replace(misread, step=step, evidence=misread.evidence.replace(f"step {misread.step}", f"step {step}"))
