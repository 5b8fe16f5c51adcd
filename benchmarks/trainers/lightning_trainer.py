"""Lightning's Trainer, which owns the loop."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from shardproof.ranks import Place
from trainers.by_hand import shard, split
from trainers.gate import GatedLoop
from trainers.task import Task


class Lightning(GatedLoop):
    """`fit` of a LightningModule, with everything off that can be turned off: bar, checkpoints, logger, summary."""

    def __init__(self, task: Task, place: Place) -> None:
        import lightning

        super().__init__(task, place)
        self._loader: DataLoader = task.loader(place.rank)
        self._module = _module(self)
        self._trainer = lightning.Trainer(
            accelerator=place.device().type,
            devices=task.parallelism.world_size,
            strategy=_strategy(task),
            precision="32-true",
            max_steps=-1,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        self.last: Tensor | None = None

    @property
    def model(self) -> nn.Module:
        # DDP is put around it when training starts.
        return self._trainer.strategy.model or self._module

    def train(self) -> None:
        self._trainer.fit(self._module, self._loader)

    def loss(self) -> float:
        return self.last.item()


def _module(contestant: Lightning) -> nn.Module:
    """The experiment as Lightning wants it."""
    import lightning

    task = contestant.task

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = task.experiment.model()

        def configure_model(self) -> None:
            if task.strategy in {"single", "ddp"} or self.device_mesh is None:
                return
            if task.parallelism.tp > 1:
                split(task, self.inner, self.device_mesh["tensor_parallel"])
            if task.parallelism.dp_shard > 1:
                shard(task, self.inner, self.device_mesh["data_parallel"])

        def configure_optimizers(self) -> Any:
            return task.experiment.optimizer(self.inner)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss = task.experiment.loss(self.inner, batch)
            contestant.last = loss.detach()
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            contestant.gate()

    return Module()


def _strategy(task: Task) -> object:
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    if task.strategy == "single":
        return "auto"
    if task.strategy == "ddp":
        return DDPStrategy()
    return ModelParallelStrategy(data_parallel_size=task.parallelism.dp_shard, tensor_parallel_size=task.parallelism.tp)
