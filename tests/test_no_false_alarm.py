"""Right code never gets a finding: models, meshes, dtypes, batches and optimizers drawn at random.

    SHARDPROOF_DRAWS=200 pytest -s tests/test_no_false_alarm.py                      # the long draw, a few minutes
    SHARDPROOF_DRAWS=200 SHARDPROOF_SEED=7 pytest -s tests/test_no_false_alarm.py    # another one

The suite draws a few, always the same. All draws are checked before anything is reported, so that a long run shows
every false alarm, each with the draw that made it. `-s` shows how far from the reference right code lies.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from math import lcm
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils.data import Dataset

import shardproof as sp
from shardproof.zoo.fixtures.decoder import Decoder
from shardproof.zoo.fixtures.megatron import split, split_sequence
from shardproof.zoo.setting import Setting

DRAWS = int(os.environ.get("SHARDPROOF_DRAWS", "12"))
SEED = os.environ.get("SHARDPROOF_SEED")

MESHES = [
    (replicate, shard, tp)
    for replicate in (1, 2, 3, 4, 6)
    for shard in (1, 2, 3, 4, 6)
    for tp in (1, 2, 3, 4)
    if 2 <= replicate * shard * tp <= 4
]
"""Ranks of dp_replicate, dp_shard and tp: all meshes of 2 to 4 ranks."""

LARGER_MESHES = [(3, 2, 1), (2, 3, 1), (3, 1, 2), (1, 2, 3), (1, 6, 1)]
"""Some of 6 ranks."""

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}
IGNORED = -100
WORDS = 12


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Everything that one check depends on."""

    model: str
    """`mlp` and `decoder` are laid out by torch, `split` and `split_sequence` by hand."""
    mesh: tuple[int, int, int]
    dtype: str
    seed: int
    width: int
    microbatches: int
    samples: int
    """Of each micro-batch."""
    steps: int
    ragged: bool
    short: bool
    """The data set is no whole number of batches."""
    clip: float | None
    optimizer: str
    shuffle: bool
    activation: str
    bias: bool
    norm: str
    frozen: bool
    tied: bool

    @property
    def strategy(self) -> str:
        """The mesh in words."""
        return ",".join(
            f"{axis}={size}" for axis, size in zip(("dp_replicate", "dp_shard", "tp"), self.mesh, strict=True)
        )

    @property
    def batch(self) -> int:
        """Samples of a global batch."""
        return self.samples * self.microbatches * self.mesh[0] * self.mesh[1]

    @property
    def heads(self) -> int:
        """Attention heads: a whole number for every tensor-parallel rank."""
        return lcm(2, self.mesh[2])

    @property
    def length(self) -> int:
        """Tokens of a sample, with a slice for every tensor-parallel rank."""
        return lcm(6, self.mesh[2])


@st.composite
def draws(draw: Any) -> Drawn:
    """Any right experiment of this file."""
    model = draw(st.sampled_from(["mlp", "decoder", "split", "split_sequence"]))
    meshes = [*MESHES, *MESHES, *LARGER_MESHES]
    # Tensor parallelism by hand goes with DDP.
    mesh = draw(st.sampled_from([m for m in meshes if model in ("mlp", "decoder") or (m[1] == 1 and m[2] > 1)]))
    return Drawn(
        model=model,
        mesh=mesh,
        dtype=draw(st.sampled_from(["float64", "float32", "bfloat16"])),
        seed=draw(st.integers(0, 10_000)),
        width=draw(st.integers(1, 6).map(lambda half: 2 * half)),
        microbatches=draw(st.integers(1, 4)),
        samples=draw(st.integers(1, 4)),
        steps=draw(st.integers(1, 3)),
        ragged=draw(st.booleans()),
        short=draw(st.booleans()),
        clip=draw(st.sampled_from([None, 0.05, 1.0])),
        optimizer=draw(st.sampled_from(["sgd", "momentum", "adamw"])),
        shuffle=draw(st.booleans()),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        bias=draw(st.booleans()),
        norm=draw(st.sampled_from(["layer", "rms", "none"])),
        frozen=draw(st.booleans()),
        tied=draw(st.booleans()),
    )


def normed(drawn: Drawn, width: int) -> nn.Module:
    """The norm that was drawn."""
    return {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "none": nn.Identity}[drawn.norm](*[width][: drawn.norm != "none"])


def spread_(model: nn.Module) -> None:
    """Biases of 0 and norms of 1 hide what is added twice or dropped."""
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.3)


class Mlp(nn.Module):
    """Norm, two layers, head; inputs and classes are odd, so that shards are uneven."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[drawn.activation]
        features, hidden = drawn.width + 1, drawn.width * lcm(1, drawn.mesh[2])
        self.fc1 = nn.Linear(features, hidden, bias=drawn.bias)
        self.fc2 = nn.Linear(hidden, features, bias=drawn.bias)
        self.norm = normed(drawn, features)
        self.head = nn.Linear(features, 5, bias=drawn.bias)
        spread_(self)

    def forward(self, x: Tensor) -> Tensor:  # (batch, features) -> (batch, 5)
        return self.head(self.norm(x + self.fc2(self.activation(self.fc1(x)))))


class Block(nn.Module):
    """Attention and MLP with separate projections, as torch's plans want them."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        features = drawn.heads * drawn.width
        self.head, self.activation = drawn.width, ACTIVATIONS[drawn.activation]
        self.norm1, self.norm2 = normed(drawn, features), normed(drawn, features)
        self.q, self.k, self.v = (nn.Linear(features, features, bias=drawn.bias) for _ in range(3))
        self.proj = nn.Linear(features, features, bias=drawn.bias)
        self.up = nn.Linear(features, 2 * features, bias=drawn.bias)
        self.down = nn.Linear(2 * features, features, bias=drawn.bias)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, features) -> (batch, length, features)
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(self.activation(self.up(self.norm2(x))))


class PlannedDecoder(nn.Module):
    """A decoder of one block, with a head that may be tied to the embedding."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        features = drawn.heads * drawn.width
        self.tok = nn.Embedding(WORDS, features)
        self.pos = nn.Parameter(torch.empty(drawn.length, features))
        self.blocks = nn.ModuleList([Block(drawn)])
        self.norm = normed(drawn, features)
        self.head = nn.Linear(features, WORDS, bias=False)
        if drawn.tied:
            self.head.weight = self.tok.weight
        spread_(self)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, length) -> (batch, length, WORDS)
        x = self.tok(tokens) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


DECODER_PLAN = {
    "tok": RowwiseParallel(input_layouts=Replicate()),
    "blocks.*.q": "colwise",
    "blocks.*.k": "colwise",
    "blocks.*.v": "colwise",
    "blocks.*.proj": "rowwise",
    "blocks.*.up": "colwise",
    "blocks.*.down": "rowwise",
    "head": ColwiseParallel(output_layouts=Replicate()),
}


class Samples(Dataset):
    """Points `(width + 1,)` or sentences `(length,)` with targets, of which some do not count if `ragged`."""

    def __init__(self, drawn: Drawn) -> None:
        self.drawn = drawn

    def __len__(self) -> int:
        return 2 * self.drawn.batch + (1 if self.drawn.short else 0)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = self.drawn
        generator = torch.Generator().manual_seed(1_000_003 * drawn.seed + index)
        if drawn.model == "mlp":
            inputs = torch.randn(drawn.width + 1, generator=generator)
            targets = torch.randint(5, (3,), generator=generator)
        else:
            words = WORDS if drawn.model == "decoder" else 3 * setting_of(drawn).heads
            text = torch.randint(words, (drawn.length + 1,), generator=generator)
            inputs, targets = text[:-1], text[1:].clone()
        if drawn.ragged:
            targets[1 + (index * index // 3 + drawn.seed) % len(targets) :] = IGNORED
        return inputs, targets


def setting_of(drawn: Drawn) -> Setting:
    """The setting of the zoo's decoder, which is cut by hand."""
    return Setting(seed=drawn.seed, width=drawn.width, dp=2, tp=max(drawn.mesh[2], 2), grid=(2, max(drawn.mesh[2], 2)))


def built(drawn: Drawn) -> nn.Module:
    """The model, with its first layer frozen if drawn."""
    if drawn.model == "mlp":
        model: nn.Module = Mlp(drawn)
        first = model.fc1
    elif drawn.model == "decoder":
        model = PlannedDecoder(drawn)
        first = model.blocks[0].up
    else:
        model = Decoder(setting_of(drawn), tied=drawn.tied)
        model.pos = nn.Embedding(drawn.length, model.pos.embedding_dim)
        nn.init.normal_(model.pos.weight, std=0.3)
        first = model.pos
    if drawn.frozen:
        first.requires_grad_(False)
    return model


def loss_of(drawn: Drawn) -> Any:
    """The mean of a batch, or sum and count where samples count unequally."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor | sp.LossSum:
        outputs, targets = model(batch[0]), batch[1]
        if drawn.model == "mlp":
            outputs = outputs.unsqueeze(1).expand(-1, 3, -1)
        total = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return sp.LossSum(total, (targets != IGNORED).sum()) if drawn.ragged else total / targets.numel()

    return loss


def optimizer_of(drawn: Drawn) -> Any:
    """Over what is trained."""

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if drawn.optimizer == "adamw":
            return torch.optim.AdamW(trained, lr=1e-2)
        return torch.optim.SGD(trained, lr=0.1, momentum=0.9 if drawn.optimizer == "momentum" else 0.0)

    return optimizer


def experiment_of(drawn: Drawn) -> sp.Experiment:
    """What was drawn, as a user would write it."""
    changes: dict[str, Any] = {
        "mlp": {"tp_plan": {"fc1": "colwise", "fc2": "rowwise"}, "fsdp_units": ("fc1", "fc2")},
        "decoder": {"tp_plan": DECODER_PLAN, "fsdp_units": ("blocks.*",)},
        "split": {"parallelize": split},
        "split_sequence": {"parallelize": split_sequence},
    }[drawn.model]
    return sp.Experiment(
        model=lambda: built(drawn),
        data=Samples(drawn),
        loss=loss_of(drawn),
        optimizer=optimizer_of(drawn),
        batch_size=drawn.batch,
        microbatches=drawn.microbatches,
        steps=drawn.steps,
        seed=drawn.seed,
        max_grad_norm=drawn.clip,
        **changes,
    )


def checked(drawn: Drawn) -> sp.Report:
    """The report of one check."""
    return sp.check(
        experiment_of(drawn), (drawn.strategy,), dtype=drawn.dtype, steps=drawn.steps, shuffle=drawn.shuffle
    )


def table(worst: dict[tuple[str, str], list[float]]) -> str:
    """How far from the reference the tensors lay, in noise floors, by dtype and stage."""
    lines = [f"{'dtype':10} {'stage':16} {'tensors':>8} {'99.9%':>7} {'worst':>7}"]
    for (dtype, stage), floors in sorted(worst.items()):
        ordered = sorted(floors)
        quantile = ordered[min(len(ordered) - 1, int(0.999 * len(ordered)))]
        lines.append(f"{dtype:10} {stage:16} {len(ordered):8} {quantile:7.2f} {ordered[-1]:7.2f}")
    return "\n".join(lines)


@pytest.mark.timeout(0)
def test_right_code_never_gets_a_finding() -> None:
    alarms: list[str] = []
    worst: dict[tuple[str, str], list[float]] = defaultdict(list)

    def one(drawn: Drawn) -> None:
        try:
            report = checked(drawn)
        except sp.ShardproofError as error:
            alarms.append(f"{drawn}\n{error}")
            return
        compared = report.runs[0].comparisons
        different = [c for c in compared if c.verdict is sp.Verdict.DIFFERENT]
        if not report.ok or report.first is not None or different:
            alarms.append(f"{drawn}\n{report}")
        for c in compared:
            if c.verdict in (sp.Verdict.EQUAL, sp.Verdict.ROUNDING):
                worst[drawn.dtype, c.stage].append(c.floors)

    # Generated only: an alarm is kept with the draw that made it, and the next draw is taken.
    settings = hypothesis.settings(
        max_examples=DRAWS,
        derandomize=SEED is None,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    run = settings(hypothesis.given(draws())(one))
    (run if SEED is None else hypothesis.seed(int(SEED))(run))()
    print(f"\n{table(worst)}")
    assert not alarms, f"{len(alarms)} false alarms\n" + "\n\n".join(alarms)
