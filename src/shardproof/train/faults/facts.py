"""What is known of a right run before a fault is planted in it: where a fault fits, and what would hide it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shardproof.parallel.piece import Piece
from shardproof.spec.parallelism import Parallelism

CLEAR = 1e3
"""Noise floors above which a gradient or an update says something: a key's bias in attention has none but round-off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """A run that agreed with the reference. Plain data: it crosses a pipe."""

    run: str
    """Name under which the run's files lie."""

    parallelism: Parallelism
    steps: int
    microbatches: int
    seed: int
    max_grad_norm: float | None
    batch_split_over_tp: bool
    reads: tuple[tuple[tuple[tuple[str, ...], ...], ...], ...]
    """Digests of samples: [rank][step][micro-batch][sample]."""

    pieces: tuple[Mapping[str, Piece], ...]
    """[rank]: parameter name -> where the rank's part lies."""

    gradients: Mapping[str, float] = field(default_factory=dict)
    """Parameter name -> max|gradient| of the first step, in noise floors."""

    moved: Mapping[str, float] = field(default_factory=dict)
    """Parameter name -> how far the first step moves it, in noise floors."""

    largest: Mapping[str, float] = field(default_factory=dict)
    """Parameter name -> max|value| over all forward passes."""

    constant: frozenset[str] = frozenset()
    """Parameters whose initial values are all the same number."""

    buffers: tuple[str, ...] = ()
    """Buffers of numbers, by name."""

    has_state: bool = False
    """Whether the optimizer keeps tensors from one step to the next."""

    counts: tuple[tuple[float, ...], ...] = ()
    """[step][part]: counts of the `LossSum` parts; empty where the loss is none."""

    norms: tuple[float, ...] = ()
    """[step]: the gradient norm before clipping, where it was recorded."""

    def clear(self, names: Iterable[str], floors: Mapping[str, float] | None = None) -> list[str]:
        """Those of `names` whose gradient (or what `floors` says of them) is no round-off; all of them if none is."""
        names, floors = list(names), self.gradients if floors is None else floors
        return [name for name in names if floors.get(name, 0.0) > CLEAR] or names

    def pick(self, names: Iterable[str], what: str) -> str:
        """One of `names`, the same for the same experiment, layout and fault."""
        return random.Random(f"{self.seed} {self.parallelism.degrees} {what}").choice(list(names))

    def trained(self) -> list[str]:
        """Parameters with a gradient."""
        return [name for name in self.pieces[0] if name in self.gradients]

    def split_over(self, axis: str) -> list[str]:
        """Parameters of which ranks that differ on `axis` alone hold different parts."""
        return [name for name in self.pieces[0] if self._is_split(name, axis)]

    def whole_over_tp(self) -> list[str]:
        """Parameters of which tensor-parallel peers hold the same part."""
        split = set(self.split_over("tp"))
        return [name for name in self.pieces[0] if name not in split]

    def peer(self, rank: int, axis: str, steps: int = 1) -> int:
        """The rank that is `steps` further on `axis`, around its end."""
        at = self.parallelism.coordinates(rank)
        at[axis] = (at[axis] + steps) % getattr(self.parallelism, axis)
        return (at["dp_replicate"] * self.parallelism.dp_shard + at["dp_shard"]) * self.parallelism.tp + at["tp"]

    def row_parallel(self) -> list[str]:
        """Modules whose matrix is split over `tp` along the inputs, so that their outputs are partial sums."""
        found = []
        for name in self.split_over("tp"):
            piece = self.pieces[0][name]
            inputs = len(piece.whole) == 2 and piece.shape[1] < piece.whole[1]
            own_rows = piece.shape[0] == piece.whole[0] or self.parallelism.dp_shard > 1
            if name.endswith(".weight") and inputs and own_rows:
                found.append(name.removesuffix(".weight"))
        return found

    @property
    def same_reads(self) -> bool:
        """Whether all data ranks read the same samples in every step."""
        read = [[sorted(s for part in step for s in part) for step in rank] for rank in self.reads]
        return all(own == read[0] for own in read)

    @property
    def one_sample(self) -> bool:
        """Whether every sample that was read is like every other."""
        return len({s for rank in self.reads for step in rank for part in step for s in part}) == 1

    def _is_split(self, name: str, axis: str) -> bool:
        for rank, own in enumerate(self.pieces):
            theirs = self.pieces[self.peer(rank, axis)].get(name)
            if name not in own or theirs is None:
                continue
            # A plain tensor smaller than the whole was split by hand, which is over tp.
            if not own[name].declared and own[name].shape != own[name].whole:
                return axis == "tp"
            one = own[name]
            if (one.offset, one.shape, one.stretch) != (theirs.offset, theirs.shape, theirs.stretch):
                return True
        return False
