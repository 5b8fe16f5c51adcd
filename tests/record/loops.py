"""Small models and loops that are trained twice: as they are, and while they are recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from shardproof.trace.folder.reader import RankTrace, open_recording
from shardproof.trace.record import Record

Outcome = tuple[list[float], list[Tensor], Tensor]


def saved(_ctx: object, op: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    """Keeps what a hook's own copies would be mistaken for."""
    kept = (torch.ops.aten.addmm.default, torch.ops.aten.clone.default, torch.ops.aten.detach.default)
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS: dict[str, Callable[..., Any]] = {
    "": lambda function, x: function(x),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "selective": partial(
        checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, saved)
    ),
}


class Block(nn.Module):
    def __init__(self, checkpointed: str) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(4, 8), nn.Dropout(0.25), nn.Linear(8, 4)
        self.checkpointed = CHECKPOINTS[checkpointed]

    def inner(self, x: Tensor) -> Tensor:
        return self.down(self.drop(torch.relu(self.up(x)).clone()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.checkpointed(self.inner, x)


class Model(nn.Module):
    def __init__(self, checkpointed: str = "") -> None:
        super().__init__()
        self.enter = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Block(checkpointed), Block(checkpointed)])
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def built(make: Callable[[], nn.Module]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = make()
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(
    model: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int = 3,
    microbatches: int = 1,
    amp: bool = False,
    after: Callable[[], object] = lambda: None,
) -> list[float]:
    """`after` is called after each step."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(microbatches):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
                loss = model(torch.randn(3, 4)).float().square().mean()
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.5)
        optimizer.step()
        after()
    return losses


def outcome(model: nn.Module, losses: list[float]) -> Outcome:
    return losses, [p.detach().clone() for p in model.state_dict().values()], torch.get_rng_state()


def same(first: Outcome, second: Outcome) -> bool:
    return first[0] == second[0] and all(map(torch.equal, first[1], second[1])) and torch.equal(first[2], second[2])


def trace_of(folder: Path) -> RankTrace:
    return open_recording(folder).ranks[0]


def shown(trace: RankTrace, stage: str, name: str, part: str = "", step: int = 0) -> list[Tensor | None]:
    """The tensors of one key, in the order of calls."""
    return [None if record.missing else trace.tensor(n) for n, record in of(trace, stage, name, part, step)]


def of(trace: RankTrace, stage: str, name: str, part: str = "", step: int = 0) -> list[tuple[int, Record]]:
    wanted = (step, stage, name, part)
    return [(n, record) for n, record in enumerate(trace.records) if record.key == wanted]


def events(trace: RankTrace, kind: str) -> list[dict[str, Any]]:
    return [thawed(event) for event in trace.events if event["event"] == kind]


def thawed(value: Any) -> Any:
    """As dicts and lists, which can be pickled and held against a literal."""
    if isinstance(value, Mapping):
        return {key: thawed(entry) for key, entry in value.items()}
    return [thawed(entry) for entry in value] if isinstance(value, list | tuple) else value
