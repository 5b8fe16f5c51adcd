"""Accelerate: its DDP, and what it makes of FSDP where there is no accelerator."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.data import DataLoader

from shardproof.ranks import Place
from trainers.contestant import OwnLoop, endless
from trainers.task import Task


class Accelerate(OwnLoop):
    """`prepare`, then `accelerator.backward`; `prepare` cuts the data itself, into the parts that the others read."""

    def __init__(self, task: Task, place: Place) -> None:
        import accelerate

        super().__init__(task, place)
        asked = {}
        if task.strategy == "fsdp":
            asked["fsdp_plugin"] = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2)
        self._accelerator = accelerate.Accelerator(cpu=place.device().type == "cpu", **asked)
        model = task.experiment.model()
        # Its own loader over the whole data: batch i goes to rank i % ranks.
        loader = DataLoader(task.experiment.data, batch_size=task.experiment.batch_size // task.parallelism.dp)
        self._model, self._optimizer, loader = self._accelerator.prepare(
            model, task.experiment.optimizer(model), loader
        )
        self._loss = task.experiment.loss
        self.batches = endless(loader)

    @staticmethod
    def enters(task: Task) -> bool:
        # On one rank it would be DDP as well, as there is a process group.
        return task.strategy in {"ddp", "fsdp"}

    @property
    def model(self) -> nn.Module:
        return self._model

    def step(self, batch: list[Tensor]) -> Tensor:
        self._optimizer.zero_grad()
        loss = self._loss(self._model, batch)
        self._accelerator.backward(loss)
        self._optimizer.step()
        return loss
