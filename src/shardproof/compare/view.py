"""The records of one tensor, from the reference and from all ranks of a run, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from shardproof.compare.measure import scale
from shardproof.spec.parallelism import Parallelism
from shardproof.spec.patterns import matches
from shardproof.spec.stages import STAGES
from shardproof.trace.record import Record
from shardproof.trace.trace import Trace

Key = tuple[int, str, str, str]
"""Step, stage, name, part."""


def stand_in(key: Key, trace: Trace) -> Key:
    """Under which key a trace shows what stood at the end of a step, where nobody changed it before the next one."""
    step, stage, name, part = key
    if stage != "checkpoint" or key in trace.by_key:
        return key
    ends = ((step, end, name, part) for end in ("update", "optimizer-state", "buffer"))
    return next((end for end in ends if end in trace.by_key), key)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The trusted run, on one device, and how far rounding alone moves each of its tensors."""

    trace: Trace
    floors: Mapping[int, float]
    """Number of the record -> noise floor, in the tensor's own unit."""

    parts: Sequence[Sequence[tuple[int, int]]] = ()
    """Per step: (data rank, micro-batch) of each of the parts that the reference was fed one after the other, where
    they do not join into one batch (each padded to a length of its own); empty where it was fed whole batches."""

    sizes: Callable[[Key], float | None] = lambda _key: None
    """The largest element of a key's tensors, where it is known already: tensors may be gigabytes."""

    learn: Callable[[Key, Tensor, float], None] | None = None
    """To be told of a key that has one tensor, of that, and of its largest element, by who estimates floors from them;
    None where floors are known."""

    def size(self, key: Key, whole: Tensor) -> float:
        """max|x| of the only tensor of a key, over its finite elements."""
        known = self.sizes(key)
        return scale(whole) if known is None else known

    def part(self, step: int, data_rank: int, microbatch: int) -> int | None:
        """Which of its parts the reference was fed for this one of the run; None where it was fed whole batches."""
        return list(self.parts[step]).index((data_rank, microbatch)) if self.parts else None

    def calls(self, step: int, shown: int) -> int:
        """Calls of a module per batch (or part), where it showed `shown` tensors in a step."""
        return shown // len(self.parts[step]) if self.parts else shown

    def floor(self, key: Key) -> float:
        """The largest floor among the records of a key."""
        numbers = self.trace.by_key.get(stand_in(key, self.trace), ())
        return max((self.floors.get(number, 0.0) for number in numbers), default=0.0)

    def tensors(self, key: Key) -> list[Tensor]:
        """The whole tensors of a key, one per call of the module, in the order of the calls."""
        # Backward visits calls in reverse; the record knows which call it belongs to.
        found = self.trace.by_key.get(stand_in(key, self.trace), ())
        numbers = sorted(found, key=lambda number: self.trace.records[number].call)
        return [self.trace.tensor(n) for n in numbers if not self.trace.records[n].missing]


@dataclass(frozen=True, kw_only=True)
class Observed:
    """A run under test: the traces of all its ranks, and how its batches were cut."""

    ranks: Sequence[Trace]
    parallelism: Parallelism
    microbatches: int
    batch_split_over_tp: bool = False
    """Whether TP peers rightly read different samples, because the plan splits the batch over `tp`."""

    samples: Mapping[int, Sequence[Sequence[int]]] = field(default_factory=dict)
    """Step -> [data rank][micro-batch] -> samples, 0 for a filler part; empty where they could not be counted."""

    placements: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Parameter name pattern -> axis -> dim, where the experiment declares what values cannot tell."""

    found: dict[tuple[str, int], tuple[int, list[Tensor] | None]] = field(default_factory=dict)
    """(parameter name, data rank) -> dim and slices that its pieces hold: told by its right initial values, and
    held to ever after, as a gradient in the wrong place must not tell its own."""

    def declared(self, name: str) -> Mapping[str, int]:
        """What `placements` says of a parameter: axis -> dim, empty where no pattern matches."""
        return next((axes for pattern, axes in self.placements.items() if matches(name, pattern)), {})

    def held(self, key: Key) -> Iterator[tuple[int, Record, Tensor | None]]:
        """(rank, record, tensor) of every piece of a key, rank by rank, in the order of the calls."""
        for rank, trace in enumerate(self.ranks):
            for number in trace.by_key.get(stand_in(key, trace), ()):
                record = trace.records[number]
                yield rank, record, None if record.missing else trace.tensor(number)

    def tp_peers(self, data_rank: int) -> list[int]:
        """Global ranks of one tensor-parallel group, in order."""
        tp = self.parallelism.tp
        return list(range(data_rank * tp, data_rank * tp + tp))

    def part(self, step: int, data_rank: int, microbatch: int) -> tuple[int, int, int]:
        """(first sample, samples, samples of the whole batch) of a part; in units of parts where nobody counted."""
        counts = self.samples.get(step)
        if not counts:
            counts = [[1] * self.microbatches] * self.parallelism.dp
        flat = [count for row in counts for count in row]
        at = data_rank * self.microbatches + microbatch
        return sum(flat[:at]), flat[at], sum(flat)


def causal_order(reference: Trace, ranks: Sequence[Trace]) -> list[Key]:
    """All keys of a run and its reference: by step, then stage, then as the reference recorded them."""
    keys: dict[Key, None] = dict.fromkeys(reference.by_key)
    for trace in ranks:
        keys.update(dict.fromkeys(trace.by_key))
    return sorted(keys, key=lambda key: (key[0], STAGES.index(key[1])))
