"""Three layers on random points: the experiment into which the code of every page in docs/causes is put.

    shardproof check examples/small.py --ranks 4

Everything that could hide a mistake is out of the way: no two samples, sizes or biases are alike, and the optimizer is
plain gradient descent.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import shardproof as sp


class Small(nn.Module):
    """7 inputs, 16 hidden features, 6 classes. No bias behind the last layer: its few numbers would fit many causes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(7, 16), nn.Linear(16, 16), nn.Linear(16, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 7) -> (batch, 6)
        return self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Mean cross entropy of points (batch, 7) and classes (batch,)."""
    return F.cross_entropy(model(batch[0]), batch[1])


drawn = torch.Generator().manual_seed(0)

experiment = sp.Experiment(
    model=Small,
    data=TensorDataset(torch.randn(96, 7, generator=drawn), torch.randint(6, (96,), generator=drawn)),
    loss=loss,
    optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    batch_size=24,
    tp_plan={"fc1": "colwise", "fc2": "rowwise"},
    fsdp_units=("fc1",),
)
