"""Lightning Fabric: its DDP, and its ModelParallelStrategy for everything that shards."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardproof.ranks import Place
from trainers.by_hand import shard, split
from trainers.contestant import OwnLoop, endless
from trainers.task import Task


class Fabric(OwnLoop):
    """Fabric's loop as its documentation writes it: `setup`, `setup_dataloaders`, `fabric.backward`."""

    def __init__(self, task: Task, place: Place) -> None:
        import lightning

        super().__init__(task, place)
        self._fabric = lightning.Fabric(
            accelerator=place.device().type,
            devices=task.parallelism.world_size,
            strategy=_strategy(task),
            precision="32-true",
        )
        self._fabric.launch()
        self._model = self._fabric.setup(task.experiment.model())
        self._optimizer = self._fabric.setup_optimizers(task.experiment.optimizer(self._model))
        self._loss = task.experiment.loss
        # The parts are cut already; Fabric would deal samples out one by one.
        loader = self._fabric.setup_dataloaders(task.loader(place.rank), use_distributed_sampler=False)
        self.batches = endless(loader)

    @property
    def model(self) -> nn.Module:
        return self._model

    def step(self, batch: list[Tensor]) -> Tensor:
        self._optimizer.zero_grad()
        loss = self._loss(self._model, batch)
        self._fabric.backward(loss)
        self._optimizer.step()
        return loss


def _strategy(task: Task) -> object:
    from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy

    if task.strategy == "single":
        return "auto"
    if task.strategy == "ddp":
        return DDPStrategy()

    def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        if task.parallelism.tp > 1:
            split(task, model, mesh["tensor_parallel"])
        return shard(task, model, mesh["data_parallel"]) if task.parallelism.dp_shard > 1 else model

    return ModelParallelStrategy(
        parallelize, data_parallel_size=task.parallelism.dp_shard, tensor_parallel_size=task.parallelism.tp
    )
