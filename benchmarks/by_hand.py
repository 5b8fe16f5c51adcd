"""What a competent engineer writes by hand to hold DDP, FSDP and TP + FSDP against each other, as the two logs do.

    python -m torch.distributed.run --nproc-per-node 4 benchmarks/by_hand.py

The model, weights, samples and loss are those of `replicated_batch` in examples/composer_mlp.py. One step is trained
under each layout in one process group; full tensors are gathered and held against DDP's with torch's own tolerances.
Nothing of shardproof is used. It compares outputs, gradients and updated weights of one model whose names and layouts
its author knows, and stops at the first tensor that is not close, without a cause.
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

WEIGHTS = {
    "0.weight": [[0.2059, 0.1117], [-0.3558, -0.0257]],
    "2.weight": [[-0.6096, -0.4934], [-0.1113, -0.6492]],
}

INPUTS = [[-0.1163, 1.2457], [-0.1163, 1.2457], [1.6768, -0.3361], [1.6768, -0.3361]]
LABELS = [0, 0, 1, 1]
"""One sample per rank, each of them twice, so that tensor-parallel peers (ranks 0, 1 and 2, 3) read the same."""


def build() -> nn.Module:
    """The logs' model, with the logs' weights."""
    layers = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    layers.load_state_dict({name: torch.tensor(weight) for name, weight in WEIGHTS.items()})
    return layers


def ddp(model: nn.Module) -> nn.Module:
    """Whole replicas on four ranks."""
    return DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    """Every parameter in four shards."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (4,)))


def tp_fsdp(model: nn.Module) -> nn.Module:
    """Columns and rows over pairs of ranks, then shards over the pairs."""
    mesh: DeviceMesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp"])


def whole(tensor: Tensor) -> Tensor:
    """Gathered from all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def one_step(model: nn.Module) -> dict[str, Tensor]:
    """Output, gradients and updated weights of one step, under plain names."""
    rank = dist.get_rank()
    inputs, labels = torch.tensor(INPUTS[rank : rank + 1]), torch.tensor(LABELS[rank : rank + 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    outputs = model(inputs)
    F.cross_entropy(outputs, labels).backward()
    seen = {"output": outputs.detach() + 0}
    names = {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}
    seen |= {f"gradient {name}": whole(parameter.grad).clone() for name, parameter in names.items()}
    optimizer.step()
    seen |= {f"update {name}": whole(parameter.detach()).clone() for name, parameter in names.items()}
    return seen


def main() -> None:
    """Train under each layout, compare with DDP, and say so on rank 0."""
    dist.init_process_group("gloo")
    want = one_step(ddp(build()))
    for lay_out in (fsdp, tp_fsdp):
        got = one_step(lay_out(build()))
        for name, tensor in want.items():
            torch.testing.assert_close(
                got[name], tensor, msg=lambda said, name=name, lay_out=lay_out: f"{lay_out.__name__} {name}: {said}"
            )
    if dist.get_rank() == 0:
        print(f"close: fsdp and tp_fsdp to ddp, {len(want)} tensors each")
    # Without it a rank sometimes aborts as its interpreter exits, after all have left the group ("terminate called
    # without an active exception"; torch 2.13): 6 of 28 runs, against 0 of 28 with it. Why it helps is not known.
    dist.barrier()
    dist.destroy_process_group()
    # One run in some dozens aborts with it too; ended like this, none is known to.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
