"""Ranks that read what they should not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from shardproof.parallel.data import Microbatch
from shardproof.train.faults.facts import Facts
from shardproof.train.faults.fault import Batches, Fault, Scene

ALIKE = "all samples that are read are alike"


@dataclass(frozen=True, kw_only=True)
class PeersApart(Fault):
    """The last rank of each tensor-parallel group reads other samples than its peers."""

    name = "batch-differs-in-group"
    stage = "batch"
    in_loader = True

    @classmethod
    def plan(cls, facts: Facts) -> Sequence[Self] | str:
        """Where there are peers that should read the same."""
        if facts.parallelism.tp == 1:
            return "there is one tp rank"
        return "the plan splits the batch over tp" if facts.batch_split_over_tp else [cls()]

    @property
    def place(self) -> str:
        """Whose batches."""
        return "batches of the last rank of every tp group"

    @property
    def steps(self) -> int | None:
        """All, as a batch further on may be read."""
        return None

    def reason(self, facts: Facts) -> str:
        """Alike."""
        return ALIKE if facts.one_sample else ""

    def batches(self, batches: Batches, others: Callable[[str, int], list[list[Any]] | None], scene: Scene) -> Batches:
        """Read one micro-batch ahead, in a circle; where shapes differ, turn each by a sample.

        Shapes stay as they are: collectives between peers whose tensors differ in shape would hang.
        """
        del others
        if scene.at["tp"] < scene.parallelism.tp - 1:
            return batches
        flat = [part for step in batches for part in step]
        scene.planted += 1
        if len({_built(part.batch) for part in flat}) == 1 and len(flat) > 1:
            turned = [*flat[1:], flat[0]]
            own = [Microbatch(other.batch, part.weight) for part, other in zip(flat, turned, strict=True)]
        else:
            own = [Microbatch(_rolled(part.batch), part.weight) for part in flat]
        per_step = len(batches[0])
        return [own[start : start + per_step] for start in range(0, len(own), per_step)]


@dataclass(frozen=True, kw_only=True)
class Repeated(Fault):
    """Every data rank reads what the first one reads."""

    name = "batch-repeated-across-dp"
    stage = "batch"
    in_loader = True

    run: str
    """The earlier run whose batches are read once more."""

    @classmethod
    def plan(cls, facts: Facts) -> Sequence[Self] | str:
        """Where there are several data ranks."""
        return [cls(run=facts.run)] if facts.parallelism.dp > 1 else "there is one data rank"

    @property
    def place(self) -> str:
        """Whose batches."""
        return "batches of all data ranks but the first"

    @property
    def steps(self) -> int | None:
        """All: whether samples are read twice is seen over an epoch."""
        return None

    def reason(self, facts: Facts) -> str:
        """Alike, or the same already."""
        if facts.one_sample:
            return ALIKE
        return "all data ranks read the same samples already" if facts.same_reads else ""

    def batches(self, batches: Batches, others: Callable[[str, int], list[list[Any]] | None], scene: Scene) -> Batches:
        """Those of the rank of the first data rank with the own place on tp."""
        read = others(self.run, scene.at["tp"])
        if scene.at["dp"] == 0 or read is None:
            return batches
        scene.planted += 1
        return [
            [Microbatch(batch, part.weight) for part, batch in zip(parts, step, strict=True)]
            for parts, step in zip(batches, read, strict=False)
        ]


def _built(batch: Any) -> object:
    leaves, spec = tree_flatten(batch)
    shapes = tuple((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves)
    return (str(spec), shapes)


def _rolled(batch: Any) -> Any:
    return tree_map_only(Tensor, lambda leaf: leaf.roll(1, 0) if leaf.dim() else leaf, batch)
