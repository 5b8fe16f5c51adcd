"""What can be told of a run while it goes on: the events, and how to listen to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from shardproof.trainer.loop import Loop


class Callback:
    """Methods named after the events of a run. All of them do nothing here; write those that you need.

    Every rank calls every event, in the same order, so that a callback may run collectives if all ranks do. What is
    logged (`loop.log`) is taken from rank 0. A callback that draws random numbers changes nothing: generators are
    seeded at the start of every step.
    """

    watches_gradients: bool = False
    """Whether `gradients` is to be called. It is asked once, when training starts."""

    def fit_start(self, loop: Loop) -> None:
        """Training starts, or goes on from a checkpoint that has been loaded already."""

    def epoch_start(self, loop: Loop) -> None:
        """`loop.progress.epoch` starts, from its first step or, after a resumption, somewhere inside."""

    def step_start(self, loop: Loop) -> None:
        """The batch of `loop.progress.step` has been read; generators are not seeded yet."""

    def gradients(self, loop: Loop) -> None:
        """Gradients are complete (reduced, unscaled) and not clipped yet. Only where `watches_gradients`."""

    def step_end(self, loop: Loop) -> None:
        """An optimizer step is over. `loop.loss` is this rank's loss, `loop.progress` counts the step already."""

    def losses(self, loop: Loop, first_step: int, losses: list[float]) -> None:
        """The global losses of the steps from `first_step` on, from 0, as ranks exchanged them: some steps late, none
        left out.

        The same on every rank.
        """

    def epoch_end(self, loop: Loop) -> None:
        """An epoch is over; evaluation and saving, where they are due, come after it."""

    def eval_end(self, loop: Loop, results: Mapping[str, float]) -> None:
        """An evaluation is over. `results` are the same on every rank: `loss` and the metrics, without prefix."""

    def saved(self, loop: Loop, path: Path) -> None:
        """A checkpoint was written to `path`. With `save_async` it is being written, and there for good when the next
        one starts, or at `fit_end`.
        """

    def fit_end(self, loop: Loop) -> None:
        """Training is over, for whatever reason but an error: `loop.stop_reason` has it."""

    def state_dict(self) -> dict[str, Any]:
        """What to save in checkpoints: numbers, texts, lists, tuples, dicts, small tensors; the same on every rank."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` returned in the run that is gone on with."""
        del state


def global_norm(loop: Loop) -> Tensor:
    """2-norm of all gradients as one device would compute it, shape `()`; a collective: all ranks must call it."""
    from shardproof.train.norm import total_norm  # noqa: PLC0415  (a callback is written without loading torch)

    return total_norm(loop.parameters, loop.mesh)
