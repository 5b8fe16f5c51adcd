"""Which samples two recorded runs read, and where each sample of one stands in the other's batch."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from shardproof.align.traces import Aligned
from shardproof.compare.reads import Misread, data_axis
from shardproof.spec.parallelism import Parallelism
from shardproof.trace.record import Record
from shardproof.trace.trace import Trace

Reads = dict[int, list[list[tuple[str, ...]]]]
"""Step -> [place on the mesh][micro-batch] -> digest of every sample."""


def reads_of(traces: Sequence[Trace]) -> Reads:
    """What every rank read, as it was recorded: digests over all tensors of a sample."""
    return _by_step(
        traces,
        (
            (place, record, record.samples)
            for place, trace in enumerate(traces)
            for record in trace.records
            if record.stage == "batch" and not record.unknown
        ),
    )


def by_content(first: Sequence[Trace], second: Sequence[Trace]) -> tuple[Reads, Reads] | None:
    """Both sides' reads by the values of the one input that they have in common; None where they have none.

    Digests over whole samples differ where one side hands its model a mask or labels that the other leaves out, or
    feeds it another dtype. Values are held against each other in the lower precision of the two.
    """
    one, two = _inputs(first), _inputs(second)
    best: tuple[tuple[int, int], str, str, torch.dtype] | None = None
    for left, (dtype, tensors) in one.items():
        for right, (other, theirs) in two.items():
            common = _common(dtype, other)
            if common is None:
                continue
            both = _counted(tensors, common) & _counted(theirs, common)
            # Of a mask most samples have the same values: what tells them apart is what they differ in.
            shared = len(both), both.total()
            if both and (best is None or shared > best[0]):
                best = (shared, left, right, common)
    if best is None:
        return None
    _, left, right, common = best
    return _digested(first, left, common), _digested(second, right, common)


def unpadded(first: Sequence[Trace], second: Sequence[Trace]) -> tuple[Reads, Reads] | None:
    """Both sides' reads by one input of whole numbers without what fills it up at either end; None where no such
    input makes the first step of both the same.

    A loop that pads each part of a batch to a length of its own reads the same samples in other shapes.
    """
    one, two = _inputs(first), _inputs(second)
    for part in one.keys() & two.keys():
        tensors = [*one[part][1], *two[part][1]]
        if len({tensor.shape[1:] for tensor in tensors}) < 2 or any(_is_number(t) or t.dim() != 2 for t in tensors):
            continue
        # The filler is what most samples end with; where it is no filler, it is taken from both sides alike.
        ends = torch.cat([tensor[:, -1].to(torch.int64) for tensor in tensors if tensor.numel()])
        filler = int(ends.mode().values) if len(ends) else 0
        reads = _digested(first, part, torch.int64, filler), _digested(second, part, torch.int64, filler)
        if same_samples(*reads):
            return reads
    return None


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def misread(
    got: Sequence[Sequence[tuple[str, ...]]],
    want: Sequence[str],
    parallelism: Parallelism,
    *,
    step: int,
    labels: tuple[str, str],
) -> Misread | None:
    """What is wrong with the samples that the data ranks of a step read, held against those of the other run."""
    # One rank speaks for its tp peers: that they agree is asked before this.
    read = {rank: [s for part in got[rank] for s in part] for rank in range(0, parallelism.world_size, parallelism.tp)}
    every, wanted = Counter(s for own in read.values() for s in own), Counter(want)
    if every == wanted:
        return None
    for first, own in read.items():
        twins = [rank for rank in read if Counter(read[rank]) == Counter(own)]
        if len(twins) > 1 and own and any(every[s] > wanted[s] for s in own):
            ranks = tuple(rank + peer for rank in twins for peer in range(parallelism.tp))
            return Misread(
                cause="batch-repeated-across-dp",
                step=step,
                axis=data_axis(parallelism),
                ranks=ranks,
                evidence=f"data ranks {', '.join(map(str, twins))} read the very same {len(own)} samples at step "
                f"{step}, which {labels[0]} read once",
                fix='give each data rank its own part of the global batch, by mesh["dp"].get_local_rank()',
            )
        del first
    missing, extra = (wanted - every).total(), (every - wanted).total()
    return Misread(
        cause="data-order",
        step=step,
        axis="dp",
        ranks=tuple(rank for rank, own in read.items() if any(every[s] > wanted[s] for s in own)) or tuple(read),
        evidence=f"at step {step} {labels[0]} read {wanted.total()} samples and {labels[1]} {every.total()}: {missing} "
        f"of the first were not read by the second, {extra} of the second not by the first",
        fix="feed both runs the same global batch in each step: same seed, shuffle and global batch size "
        "(ranks times micro-batches times samples), and a sampler over the data ranks only",
    )


def may_agree(got: Sequence[str], want: Sequence[str], *, all_got: bool, all_want: bool) -> bool:
    """Whether two runs may have read the same, of which not everything that they read is known."""
    read, wanted = Counter(got), Counter(want)
    return not (all_want and read - wanted) and not (all_got and wanted - read)


def places(wanted: Sequence[str], held: Sequence[str]) -> list[int] | None:
    """For each of the `wanted` samples its place among the `held` ones, each place once; None where one is missing."""
    # From the left one by one: a stranger's recording may show one sample a million times.
    at: dict[str, deque[int]] = defaultdict(deque)
    for place, sample in enumerate(held):
        at[sample].append(place)
    found = []
    for sample in wanted:
        if not at[sample]:
            return None
        found.append(at[sample].popleft())
    return found


def _by_step(traces: Sequence[Trace], read: Iterable[tuple[int, Record, tuple[str, ...]]]) -> Reads:
    found: dict[int, list[dict[int, tuple[str, ...]]]] = {}
    for place, record, samples in read:
        own = found.setdefault(record.step, [{} for _ in traces])[place]
        # What a loop calls its model with once more before backward may be the model's own output.
        if not own.get(record.call):
            own[record.call] = samples
    # In order of the calls, whatever their numbers: a recording may skip some, and be anybody's.
    return {step: [[parts[call] for call in sorted(parts)] for parts in ranks] for step, ranks in found.items()}


def _inputs(traces: Sequence[Trace]) -> dict[str, tuple[torch.dtype, list[Tensor]]]:
    """Input -> its tensors in the first recorded step, over all ranks and micro-batches."""
    found: dict[str, tuple[torch.dtype, list[Tensor]]] = {}
    first = min((record.step for trace in traces for record in trace.records if record.stage == "batch"), default=0)
    for trace in traces:
        for number in _inputs_of(trace):
            if trace.records[number].step == first:
                tensor = trace.tensor(number)
                found.setdefault(trace.records[number].part, (tensor.dtype, []))[1].append(tensor)
    return found


def _common(first: torch.dtype, second: torch.dtype) -> torch.dtype | None:
    """The type in which values of both may be the same; None for numbers against tokens."""
    if first.is_floating_point != second.is_floating_point:
        return None
    if not first.is_floating_point:
        return torch.int64
    return min(first, second, key=lambda dtype: -torch.finfo(dtype).eps)


def _counted(tensors: Sequence[Tensor], dtype: torch.dtype) -> Counter[str]:
    return Counter(digest for tensor in tensors for digest in _rows(tensor, dtype))


def _rows(tensor: Tensor, dtype: torch.dtype, filler: int | None = None) -> tuple[str, ...]:
    if filler is not None:
        return tuple(_without(row, filler) for row in tensor.to(dtype))
    rows = tensor.to(dtype).contiguous().reshape(tensor.shape[0], -1)
    words = rows.view(torch.uint8).numpy()
    return tuple(hashlib.blake2b(row.tobytes(), digest_size=12).hexdigest() for row in words)


def _without(row: Tensor, filler: int) -> str:
    kept = (row != filler).nonzero()
    inside = row[int(kept[0]) : int(kept[-1]) + 1] if len(kept) else row[:0]
    return hashlib.blake2b(inside.contiguous().numpy().tobytes(), digest_size=12).hexdigest()


def _digested(traces: Sequence[Trace], part: str, dtype: torch.dtype, filler: int | None = None) -> Reads:
    return _by_step(
        traces,
        (
            (place, trace.records[number], _rows(trace.tensor(number), dtype, filler))
            for place, trace in enumerate(traces)
            for number in _inputs_of(trace)
            if trace.records[number].part == part
        ),
    )


def _inputs_of(trace: Trace) -> Iterator[int]:
    """Numbers of the batch records whose values were kept, by sample."""
    for number, record in enumerate(trace.records):
        kept = isinstance(trace, Aligned) and trace.trace.depth(number) == "full" and trace.trace.shape(number)
        if record.stage == "batch" and kept:
            yield number


def shares_samples(first: Reads, second: Reads) -> bool:
    """Whether the first step that both show has a sample in common."""
    one, two = _at_first(first, second)
    return bool(one & two)


def same_samples(first: Reads, second: Reads) -> bool:
    """Whether the first step that both show has the same samples, whatever ranks and peers read them."""
    one, two = _at_first(first, second)
    return one == two


def _at_first(first: Reads, second: Reads) -> tuple[set[str], set[str]]:
    steps = sorted(first.keys() & second.keys())[:1]
    one, two = (
        {sample for step in steps for rank in reads[step] for part in rank for sample in part}
        for reads in (first, second)
    )
    return one, two


def counted(samples: Mapping[int, Sequence[Sequence[int]]], step: int) -> int:
    """Samples of a step, over all data ranks."""
    return sum(count for row in samples.get(step, ()) for count in row)
