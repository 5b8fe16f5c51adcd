"""transformers' Trainer, which owns the loop."""

from __future__ import annotations

import tempfile
from typing import Any

from torch import Tensor, nn
from torch.utils.data import default_collate

from shardproof.ranks import Place
from trainers.gate import GatedLoop
from trainers.task import Task


class HfTrainer(GatedLoop):
    """`train` with logging, checkpoints, reports and clipping off; it cuts the data itself, as Accelerate does."""

    def __init__(self, task: Task, place: Place) -> None:
        from transformers import TrainingArguments

        super().__init__(task, place)
        self._folder = tempfile.TemporaryDirectory()
        arguments = TrainingArguments(
            output_dir=self._folder.name,
            use_cpu=place.device().type == "cpu",
            per_device_train_batch_size=task.experiment.batch_size // task.parallelism.dp,
            max_steps=10**9,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        self.last: Tensor | None = None
        self._trainer = _trainer(self, task.experiment.model(), arguments)

    @staticmethod
    def enters(task: Task) -> bool:
        # On one rank it would be DDP as well, as there is a process group.
        # On CPUs Accelerate 1.15 refuses it a sharded model: its ParallelismConfig knows no CPU ranks (MULTI_CPU).
        return task.model == "llama" and task.strategy == "ddp"

    @property
    def model(self) -> nn.Module:
        return self._trainer.model_wrapped

    def train(self) -> None:
        self._trainer.train()

    def loss(self) -> float:
        return self.last.item()

    def close(self) -> None:
        super().close()
        self._folder.cleanup()


def _trainer(contestant: HfTrainer, model: nn.Module, arguments: Any) -> Any:
    from transformers import Trainer, TrainerCallback

    experiment = contestant.task.experiment

    class Gate(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            contestant.gate()

    class WithLoss(Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, **rest: Any) -> Tensor:
            loss = experiment.loss(model, inputs["batch"])
            contestant.last = loss.detach()
            return loss

    return WithLoss(
        model=model,
        args=arguments,
        train_dataset=experiment.data,
        data_collator=lambda samples: {"batch": default_collate(samples)},
        optimizers=(experiment.optimizer(model), None),
        callbacks=[Gate()],
    )
