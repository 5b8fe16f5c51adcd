"""The model, data and runs of two logs in which someone hunts tensor-parallel bugs by printing tensors rank by rank.

    shardproof check examples/composer_mlp.py --ranks 4                   # shardproof's own loader: parity
    shardproof check examples/composer_mlp.py:mixed_inputs --ranks 4      # peers read different samples: finding
    shardproof check examples/composer_mlp.py:sharded_batch --ranks 4     # gradients are twice too large: finding

Two linear layers and four ranks of Composer's trainer. Its loader hands each rank one sample per step, whatever the
layout, so tensor-parallel peers read the same sample only where the dataset repeats it. SCENARIOS holds every run.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils.data import DataLoader, Dataset

import shardproof as sp

RANKS = 4

WEIGHTS = {
    "0.weight": [[0.2059, 0.1117], [-0.3558, -0.0257]],
    "2.weight": [[-0.6096, -0.4934], [-0.1113, -0.6492]],
}

EIGHT = [
    [-0.1163, 1.2457],
    [1.6768, -0.3361],
    [-0.1486, -1.4091],
    [-2.0410, -0.2618],
    [0.5677, -0.6094],
    [-0.5893, -1.2527],
    [-0.9650, 1.0489],
    [-0.3627, 0.0174],
]
LABELS = [0, 1, 1, 1, 0, 0, 1, 0]

MIXED = [[0.0611, -0.9390], [0.3092, -0.2400], [1.2356, 0.0], [-1.0459, 0.2011]]
"""Only rank 3's sample is logged. Rank 2's gives the hidden unit that the logged output implies; two are free."""

SHARDED = [[1.6768, -0.3361], [0.4859, -0.0275], [0.1, -0.5], [0.1996, 0.0705]]
"""Only rank 3's sample is logged. The others are solved from the logged gradients of DDP."""

GRADIENTS = [[0.4859, -0.0275], [-0.1163, 1.2457]]
"""The two samples behind the logged gradients of the replicated run."""


class Samples(Dataset):
    """`length` samples, each given `replication` times in a row: index i is sample i // replication, as in the log."""

    def __init__(self, inputs: list[list[float]], *, length: int, replication: int = 1) -> None:
        self.inputs = inputs
        self.rows = [index // replication for index in range(length)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:  # (2,), ()
        row = self.rows[index]
        return torch.tensor(self.inputs[row]), torch.tensor(LABELS[row])


def model() -> nn.Module:
    """The logs' model, with the logs' weights."""
    layers = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    layers.load_state_dict({name: torch.tensor(weight) for name, weight in WEIGHTS.items()})
    return layers


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross entropy of inputs (batch, 2) and labels (batch,)."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def sum_of_outputs(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Sum of a sample's outputs, mean over samples: what the logs call backward on."""
    inputs, _ = batch
    return model(inputs).sum(dim=-1).mean()


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Plain SGD: Adam would hide gradients that are twice too large."""
    # The logs only run forward: a step this small moves the second batch's outputs by less than the logs' last digit.
    return torch.optim.SGD(model.parameters(), lr=1e-4)


def one_sample_per_rank(data: Dataset, mesh: object, parallelism: object) -> Iterator[tuple[Tensor, Tensor]]:
    """Composer's loader: split over all ranks, blind to which of them are tensor-parallel peers."""
    for index in range(dist.get_rank(), len(data), RANKS):
        inputs, label = data[index]
        yield inputs.unsqueeze(0), label.unsqueeze(0)  # (1, 2), (1,)


def one_call_too_many(data: Dataset, mesh: object, parallelism: object) -> Iterator[list[Tensor]]:
    """As `one_sample_per_rank`, but on rank 3 the log's own mistake: next() of a batch, which is a list."""
    loader = DataLoader(data, batch_size=1, sampler=range(dist.get_rank(), len(data), RANKS))
    if dist.get_rank() == 3:
        yield next(next(iter(loader)))
    yield from loader


TP_PLAN = {"0": "colwise", "2": "rowwise"}

SHARDED_PLAN = {"0": ColwiseParallel(input_layouts=Shard(0)), "2": RowwiseParallel(output_layouts=Shard(0))}
"""Peers bring a sample each and get its output back: outputs are right, but each peer's loss counts once more."""


def scenario(data: Dataset, *, steps=1, loss=cross_entropy, tp_plan=TP_PLAN, batches=one_sample_per_rank):
    """One run of the logs: four samples a step, one for each rank."""
    return sp.Experiment(
        model=model,
        data=data,
        loss=loss,
        optimizer=optimizer,
        batch_size=RANKS,
        steps=steps,
        tp_plan=tp_plan,
        batches=batches,
    )


replicated_batch = scenario(Samples(EIGHT, length=4, replication=2))
same_sample_everywhere = scenario(Samples(EIGHT, length=4, replication=4))
two_batches = scenario(Samples(EIGHT, length=8, replication=4), steps=2)
mixed_inputs = scenario(Samples(MIXED, length=4))
sharded_batch = scenario(Samples(SHARDED, length=4), loss=sum_of_outputs, tp_plan=SHARDED_PLAN)
replicated_gradients = scenario(Samples(GRADIENTS, length=4, replication=2), loss=sum_of_outputs)
crash_in_user_code = scenario(Samples(EIGHT, length=8), batches=one_call_too_many)

SCENARIOS = {
    "replicated-batch": replicated_batch,
    "same-sample-everywhere": same_sample_everywhere,
    "two-batches": two_batches,
    "mixed-inputs": mixed_inputs,
    "sharded-batch": sharded_batch,
    "replicated-gradients": replicated_gradients,
    "crash-in-user-code": crash_in_user_code,
}
"""Every run of the logs by name."""

experiment = scenario(Samples(EIGHT, length=8), steps=2, batches=None)
"""The same model with shardproof's own loader, which gives tensor-parallel peers the same samples."""
