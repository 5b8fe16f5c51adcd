"""Composer's Trainer: DDP, and FSDP2 by its environment variable FSDP_VERSION=2.

With ranks of its own, or with those of torchrun:

    python examples/frameworks/composer_trainer.py --layout fsdp
    torchrun --nproc-per-node 4 examples/frameworks/composer_trainer.py --layout fsdp
"""

import os
import sys
from argparse import Namespace

import composer_stubs  # noqa: F401  (before composer)
import torch
import torch.nn.functional as F
from composer import Callback, ComposerModel, Logger, State, Trainer
from composer.utils import dist
from task import GLOBAL_BATCH, STEPS, build, data, launch, options, record, report
from torch import Tensor, nn
from torch.utils.data import DataLoader

LAYOUTS = ("single", "ddp", "fsdp")

MISTAKES = {"unwrapped": ("ddp",), "accumulate-twice": LAYOUTS}


class Classifier(ComposerModel):
    """The model with its loss, as Composer wants it; its parameters are named `net.*`."""

    def __init__(self, net: nn.Module, mistake: str | None, accumulate: int) -> None:
        super().__init__()
        self.net, self.mistake, self.accumulate = net, mistake, accumulate

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.net(batch[0])

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        if self.mistake == "unwrapped":
            # The forward that DDP saw is thrown away, and done once more without it.
            outputs = self.net(batch[0])
        loss = F.cross_entropy(outputs, batch[1])
        # accumulate-twice: Composer scales each micro-batch by its share of the samples already.
        return loss / self.accumulate if self.mistake == "accumulate-twice" else loss


class Losses(Callback):
    """Prints the loss of each step."""

    def batch_end(self, state: State, logger: Logger) -> None:
        report(int(state.timestamp.batch) - 1, state.total_loss_dict["loss/train/total"])


def train(given: Namespace) -> None:
    """Three steps, by Trainer.fit."""
    os.environ["FSDP_VERSION"] = "2"
    samples = data(given.dtype)
    rank_batch = GLOBAL_BATCH // dist.get_world_size()
    loader = DataLoader(samples, rank_batch, sampler=dist.get_sampler(samples, shuffle=False))
    model = Classifier(build(given.dtype), given.mistake, given.accumulate)
    # Always before the Trainer shards: it puts the sharded parameters into the optimizer it is given.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = Trainer(
        model=model,
        optimizers=optimizer,
        train_dataloader=loader,
        max_duration=f"{STEPS}ba",
        device="cpu",
        device_train_microbatch_size=rank_batch // given.accumulate,
        parallelism_config={"fsdp": {}} if given.layout == "fsdp" else None,
        callbacks=[Losses()],
        progress_bar=False,
    )
    with record(given, trainer.state.model, optimizer):
        trainer.fit()
    trainer.close()


if __name__ == "__main__":
    launch(train, options(__doc__, LAYOUTS, MISTAKES, sys.argv[1:]))
