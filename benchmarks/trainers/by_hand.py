"""The loop that one writes by hand in plain torch: what every trainer is held against."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from shardproof.parallel.layout import unit_names
from shardproof.ranks import Place
from trainers.contestant import OwnLoop, endless
from trainers.task import Task


class ByHand(OwnLoop):
    """zero_grad, forward, backward, step; nothing is logged, nothing is checked."""

    def __init__(self, task: Task, place: Place) -> None:
        super().__init__(task, place)
        self._model = lay_out(task, place)
        self._optimizer = task.experiment.optimizer(self._model)
        self._loss = task.experiment.loss
        self._device = place.device()
        self.batches = endless(task.loader(place.rank))

    @property
    def model(self) -> nn.Module:
        return self._model

    def step(self, batch: list[Tensor]) -> Tensor:
        batch = [tensor.to(self._device) for tensor in batch]
        self._optimizer.zero_grad()
        loss = self._loss(self._model, batch)
        loss.backward()
        self._optimizer.step()
        return loss


def lay_out(task: Task, place: Place) -> nn.Module:
    """The model under the task's strategy, as torch's tutorials do it."""
    model = task.experiment.model().to(place.device())
    sizes = task.parallelism
    kind = place.device().type
    if task.strategy == "single":
        return model
    if task.strategy == "ddp":
        return DistributedDataParallel(model)
    if task.strategy == "fsdp":
        return shard(task, model, init_device_mesh(kind, (sizes.dp_shard,)))
    if task.strategy == "tp":
        return split(task, model, init_device_mesh(kind, (sizes.tp,)))
    if task.strategy == "tp_fsdp":
        mesh = init_device_mesh(kind, (sizes.dp_shard, sizes.tp), mesh_dim_names=("dp", "tp"))
        # TP first: fully_shard must see the split parameter to split it once more.
        return shard(task, split(task, model, mesh["tp"]), mesh["dp"])
    raise SystemExit(f"{task.strategy} is not written by hand; ddp, fsdp, tp, tp_fsdp and single are")


def shard(task: Task, model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """fully_shard of each unit, then of what is left."""
    for name in unit_names(model, task.experiment.fsdp_units):
        fully_shard(model.get_submodule(name), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def split(task: Task, model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """parallelize_module by the experiment's plan; a tie that it breaks is made again."""
    tied = task.model == "gpt"
    parallelize_module(model, mesh, {name: style(given) for name, given in task.experiment.tp_plan.items()})
    if tied:
        model.head.weight = model.tok_emb.weight
    return model


def style(given: str | ParallelStyle) -> ParallelStyle:
    """torch's style for the names that the plans of these models use, all of them of linear layers."""
    return STYLES[given]() if isinstance(given, str) else given


STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
