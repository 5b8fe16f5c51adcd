"""transformers' own layouts (`DistributedConfig`), which a model gets as it is loaded from a folder."""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardproof.ranks import Place
from trainers.contestant import OwnLoop, endless
from trainers.task import Task


class Transformers(OwnLoop):
    """A loop by hand around a model that transformers laid out: what differs is the layout alone."""

    def __init__(self, task: Task, place: Place) -> None:
        super().__init__(task, place)
        self._model = _loaded(task, place)
        self._optimizer = task.experiment.optimizer(self._model)
        self._loss = task.experiment.loss
        self.batches = endless(task.loader(place.rank))

    @staticmethod
    def enters(task: Task) -> bool:
        # It has no DDP, and lays out its own model classes only.
        return task.model == "llama" and task.strategy in {"fsdp", "tp", "tp_fsdp"}

    @property
    def model(self) -> nn.Module:
        return self._model

    def step(self, batch: list[Tensor]) -> Tensor:
        self._optimizer.zero_grad()
        loss = self._loss(self._model, batch)
        loss.backward()
        self._optimizer.step()
        return loss


def _loaded(task: Task, place: Place) -> nn.Module:
    """Rank 0 writes the weights, and every rank loads its shards of them."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=task.parallelism.tp, fsdp_size=task.parallelism.dp_shard)
    with tempfile.TemporaryDirectory() as folder:
        at = [folder]
        dist.broadcast_object_list(at)
        if place.rank == 0:
            task.experiment.model().save_pretrained(at[0])
        dist.barrier()
        model = LlamaForCausalLM.from_pretrained(at[0], distributed_config=config, dtype=torch.float32)
        dist.barrier()
    return model.train()
