"""transformers' Trainer: it wraps the model, makes the optimizer, clips and accumulates by itself.

Under DDP, which is what it makes of several ranks, and under FSDP2 with a model that transformers has sharded.

With ranks of its own, or with those of torchrun:

    python examples/frameworks/transformers_trainer.py --layout ddp
    torchrun --nproc-per-node 4 examples/frameworks/transformers_trainer.py --layout ddp
"""

import sys
import tempfile
from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist
from task import GLOBAL_BATCH, STEPS, launch, options, record
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers_native import load, tokens

LAYOUTS = ("single", "ddp", "fsdp")

MISTAKES = {"unwrapped": ("ddp",), "accumulate-twice": LAYOUTS, "accumulate-undivided": LAYOUTS}


class Attach(TrainerCallback):
    """Tells the recorder of the wrapped model and the optimizer, which are there only when training begins."""

    def __init__(self, recording: Any, trainer: Trainer) -> None:
        self.recording, self.trainer = recording, trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        # Not rest["model"]: that is the model inside of DDP.
        self.recording.attach(self.trainer.model_wrapped, self.trainer.optimizer)


class Losses(TrainerCallback):
    """Prints the loss of each step as the Trainer logs it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **rest: Any) -> None:
        if state.is_world_process_zero and "loss" in logs:
            print(f"step {state.global_step - 1} loss {float(logs['loss']):.7f}", flush=True)


class Mistaken(Trainer):
    """The user's own `compute_loss`, with one mistake."""

    mistake: str

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **rest: Any) -> Tensor:
        if self.mistake == "unwrapped":
            # self.model is the model inside, `model` the one that DDP wraps.
            return super().compute_loss(self.model, inputs, **rest)
        if self.mistake == "accumulate-twice":
            # The loss is a sum over the micro-batch, divided by the tokens of the whole step.
            return super().compute_loss(model, inputs, **rest) / self.args.gradient_accumulation_steps
        # accumulate-undivided: a mean over the micro-batch, which the Trainer takes for the above.
        return model(**inputs).loss


def train(given: Namespace) -> None:
    """Three steps, by Trainer.train."""
    ranks = 1 if given.layout == "single" else given.ranks
    # The Trainer calls the model with the sample's names.
    if given.layout == "fsdp":
        dist.init_process_group("gloo")
    samples = [{"input_ids": ids, "labels": ids} for (ids,) in tokens()]
    with tempfile.TemporaryDirectory() as folder, record(given) as recording:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=GLOBAL_BATCH // ranks // given.accumulate,
            gradient_accumulation_steps=given.accumulate,
            max_steps=STEPS,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = (Mistaken if given.mistake else Trainer)(
            model=load(given),
            args=arguments,
            train_dataset=samples,
            callbacks=[Losses()],
        )
        trainer.mistake = given.mistake
        if recording is not None:
            trainer.add_callback(Attach(recording, trainer))
        trainer.train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    launch(train, options(__doc__, LAYOUTS, MISTAKES, sys.argv[1:]))
