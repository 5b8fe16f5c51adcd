"""What one rank showed of one tensor, and where its piece lies in the whole."""

from __future__ import annotations

from dataclasses import dataclass

from shardproof.parallel.piece import Piece


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One tensor at one moment of a run, on one rank. The tensor itself is kept beside it."""

    step: int
    """Optimizer step, from 0; -1 before the first."""

    stage: str
    """One of `spec.stages.STAGES`."""

    name: str
    """Canonical name of the parameter, buffer or module; `(root)` is the model itself."""

    part: str = ""
    """Which leaf of an output or batch, or which entry of an optimizer state."""

    call: int = 0
    """The how-manieth call of the module within the step, all micro-batches together; of a batch or loss, which one."""

    piece: Piece | None = None
    """Where the tensor lies in the whole; None for an activation that is a plain tensor."""

    missing: bool = False
    """Whether there was no tensor where one could have been, as for a parameter without a gradient."""

    unknown: bool = False
    """Whether there was a tensor, of which nothing whole could be made (`compare.assemble`)."""

    draws: int = 0
    """Fingerprint of the random generator where numbers were drawn earlier in the step, else 0."""

    weight: float = 1.0
    """For a batch or a loss: the share of this micro-batch in the step's mean."""

    samples: tuple[str, ...] = ()
    """For a batch: the digest of the content of each of its samples, in their order (`trace.reads.digests`)."""

    @property
    def key(self) -> tuple[int, str, str, str]:
        """What the same tensor of another run is found by: step, stage, name, part."""
        return (self.step, self.stage, self.name, self.part)
