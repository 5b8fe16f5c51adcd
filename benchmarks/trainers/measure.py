"""What runs on the ranks: contestants that take turns in the same processes, or one alone to be weighed."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from shardproof.ranks import Place
from trainers import memory
from trainers.contestant import Contestant
from trainers.field import FIELD
from trainers.look import layout
from trainers.task import Task

EARLY = 5
"""Steps after which losses are compared for the first time, before rounding had time to grow."""

WARM_UP = 25
"""Steps of each contestant ahead of those that count, more than an epoch: they make optimizer state and buckets."""


@dataclass(kw_only=True)
class Seen:
    """What rank 0 saw of one contestant."""

    layout: str = ""
    early_loss: float = float("nan")
    last_loss: float = float("nan")
    seconds: list[float] = field(default_factory=list)
    """Of each round's steps."""
    cpu_seconds: list[float] = field(default_factory=list)
    """Of processor time, all ranks together, likewise: a busy machine disturbs it less."""


@dataclass(frozen=True, kw_only=True)
class Arena:
    """One model under one layout."""

    task: Task
    names: list[str]
    steps: int
    rounds: int

    def take_turns(self, place: Place) -> dict[str, Seen]:
        """All contestants, set up one after the other, then some steps of each in turn."""
        torch.set_num_threads(1)
        task, seen = self.task, {name: Seen() for name in self.names}
        with place.world(f"{task.model} {task.strategy}", task.parallelism.world_size):
            contestants = {}
            for name in self.names:
                contestants[name] = contestant = FIELD[name](task, place)
                contestant.steps(EARLY)
                # Not before the first steps: some lay a model out when training starts.
                seen[name].layout = layout(contestant.model, _elements(task))
                seen[name].early_loss = _mean(contestant, place)
                contestant.steps(WARM_UP - EARLY)
            # What lives through all rounds is not searched for garbage again and again in somebody's turn.
            gc.collect()
            gc.freeze()
            for number in range(self.rounds):
                turn = number % len(self.names)
                for name in self.names[turn:] + self.names[:turn]:
                    seconds, cpu_seconds = timed(contestants[name], self.steps, place)
                    seen[name].seconds.append(seconds)
                    seen[name].cpu_seconds.append(cpu_seconds)
            for name, contestant in contestants.items():
                seen[name].last_loss = _mean(contestant, place)
                contestant.close()
            # Before the world ends: a DDP that outlives its process group may wait for itself when it is destroyed.
            contestants.clear()
            del contestant
            gc.unfreeze()
            gc.collect()
        return seen

    def count(self, place: Place) -> int:
        """Floating point operations of a step, see `flops`."""
        del place
        return flops(self.task)

    def weigh(self, place: Place, name: str) -> tuple[int, int]:
        """Bytes that this rank held at most during the steps of one contestant, and of these what it added."""
        torch.set_num_threads(1)
        with place.world(f"memory {name}", self.task.parallelism.world_size):
            before = memory.held_bytes()
            contestant = FIELD[name](self.task, place)
            memory.forget_peak()
            contestant.steps(WARM_UP)
            peak = memory.peak_bytes()
            contestant.close()
            del contestant
            gc.collect()
        return peak, peak - before


def flops(task: Task) -> int:
    """Floating point operations of one step of the whole batch on one device, without the optimizer's."""
    model = task.experiment.model()
    batch = next(iter(task.loader(0)))
    with FlopCounterMode(display=False) as counter:
        task.experiment.loss(model, batch).backward()
    return counter.get_total_flops()


def timed(contestant: Contestant, steps: int, place: Place) -> tuple[float, float]:
    """Seconds until every rank has taken its steps, and of processor time that they took together."""
    _everybody(place)
    began, cpu_began = time.perf_counter(), time.process_time()
    contestant.steps(steps)
    _everybody(place)
    taken, cpu_taken = time.perf_counter() - began, time.process_time() - cpu_began
    return taken, _summed(cpu_taken, place)


def _everybody(place: Place) -> None:
    if place.device_type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def _summed(value: float, place: Place) -> float:
    """Over all ranks."""
    tensor = torch.tensor(value, dtype=torch.float64, device=place.device())
    dist.all_reduce(tensor)
    return tensor.item()


def _mean(contestant: Contestant, place: Place) -> float:
    """The loss over the whole batch: tensor-parallel peers have the same, so that the mean over all ranks is right."""
    return _summed(contestant.loss(), place) / dist.get_world_size()


def _elements(task: Task) -> int:
    return sum(parameter.numel() for parameter in task.experiment.model().parameters())
