"""shardproof's Trainer."""

from __future__ import annotations

from torch import nn

from shardproof.ranks import Place
from shardproof.spec.training import Training
from shardproof.trainer.callback import Callback
from shardproof.trainer.loop import Loop
from trainers.gate import GatedLoop
from trainers.task import Task

FOREVER = "1000000ba"


class Ours(GatedLoop):
    """What each rank of `sp.Trainer` runs, without evaluation, checkpoints and loggers, as the others have none."""

    def __init__(self, task: Task, place: Place) -> None:
        super().__init__(task, place)
        training = Training(
            max_duration=FOREVER,
            shuffle=False,
            progress_bar=False,
            device=place.device_type,
            callbacks=(_Gate(self),),
        )
        self._loop = Loop(task.experiment, task.parallelism, training, place)

    @property
    def model(self) -> nn.Module:
        return self._loop.model

    def train(self) -> None:
        self._loop.fit()

    def loss(self) -> float:
        return self._loop.loss.item()


class _Gate(Callback):
    def __init__(self, contestant: GatedLoop) -> None:
        self._contestant = contestant

    def step_end(self, loop: Loop) -> None:
        self._contestant.gate()
