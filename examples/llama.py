"""A small Llama, laid out as torchtitan lays one out: sequence parallelism between tensor-parallel attention and MLP.

    shardproof check examples/llama.py --ranks 4 --strategies ddp,fsdp,tp,tp_fsdp
    shardproof train examples/llama.py --strategy tp_fsdp --ranks 4

Whoever trains it in a loop of his own needs four names, and nothing of shardproof:

    model = build_model(seed=0)
    apply_tp(model, mesh["tp"])                      # first: FSDP cuts what tensor parallelism has left
    apply_fsdp(model, mesh["dp"])
    tokens, targets = torch.utils.data.default_collate([data[i] for i in range(8)])
"""

import string
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.data import Dataset

import shardproof as sp

SYMBOLS = "\0 \n" + string.ascii_lowercase + string.digits + string.punctuation[:25]  # the first one for all others
VOCABULARY = len(SYMBOLS)  # 64
LENGTH = 16  # tokens of a sample
WIDTH, LAYERS = 64, 2
HEADS, KV_HEADS = 8, 4  # grouped-query attention, arXiv:2305.13245: two query heads share a key and a value head
HEAD_DIM = WIDTH // HEADS
HIDDEN = 176  # of SwiGLU: 8/3 of the width (arXiv:2002.05202), rounded up to a multiple of 16
ROTARY_BASE = 10_000.0
INIT_STD = 0.02
"""2 or 4 tensor-parallel ranks divide the vocabulary, the length, both kinds of heads and the MLP."""


def rotation(length: int) -> Tensor:
    """cos and sin of each position's angles, (length, HEAD_DIM / 2, 2): RoFormer, arXiv:2104.09864."""
    speeds = ROTARY_BASE ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.arange(length)[:, None] * speeds
    return torch.stack([angles.cos(), angles.sin()], -1)


def rotate(x: Tensor, by: Tensor) -> Tensor:  # (batch, length, heads, HEAD_DIM), (length, HEAD_DIM / 2, 2)
    """Neighbouring numbers of a head, taken as points of a plane, turned by their position's angles."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)  # (batch, length, heads, HEAD_DIM / 2) each
    cos, sin = by[:, None, :, 0], by[:, None, :, 1]  # (length, 1, HEAD_DIM / 2)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


class Attention(nn.Module):
    """Causal attention of as many heads as the projections' columns hold: all of them, or this rank's."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.wk = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.wv = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.wo = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)

    def forward(self, x: Tensor, by: Tensor) -> Tensor:  # (batch, length, WIDTH) -> (batch, length, WIDTH)
        q, k, v = (proj(x).unflatten(-1, (-1, HEAD_DIM)) for proj in (self.wq, self.wk, self.wv))
        q, k = rotate(q, by), rotate(k, by)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # (batch, heads, length, HEAD_DIM)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU, arXiv:2002.05202; w1 is the gate, as in Llama's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.w2 = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.w3 = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, WIDTH) -> (batch, length, WIDTH)
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.attention = Attention()
        self.ffn_norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.feed_forward = FeedForward()

    def forward(self, x: Tensor, by: Tensor) -> Tensor:  # (batch, length, WIDTH) -> (batch, length, WIDTH)
        x = x + self.attention(self.attention_norm(x), by)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """Token embedding, blocks, norm and an output head of its own; names as in torchtitan."""

    rotation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        # Not in checkpoints, as it is made of constants alone.
        self.register_buffer("rotation", rotation(LENGTH), persistent=False)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)
        # Norms of exactly 1 would hide one that is dropped.
        for name, parameter in self.named_parameters():
            is_scale = name.endswith("norm.weight")
            nn.init.normal_(parameter, mean=float(is_scale), std=0.1 if is_scale else INIT_STD)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, length) -> (batch, length, VOCABULARY)
        x = self.tok_embeddings(tokens)
        # Of the whole sequence, also where x is this rank's part of it: attention sees it gathered.
        by = self.rotation[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, by)
        return self.output(self.norm(x))


TEXT = "\n".join(topics[name] for name in sorted(topics)).lower()


class Windows(Dataset):
    """Text cut into windows of equal length: (tokens, next tokens), both (LENGTH,)."""

    def __init__(self, text: str) -> None:
        number = {symbol: index for index, symbol in enumerate(SYMBOLS)}
        tokens = torch.tensor([number.get(letter, 0) for letter in text])
        self.windows = tokens.unfold(0, LENGTH + 1, LENGTH)  # (samples, LENGTH + 1); neighbours share one token

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.windows[index]
        return window[:-1], window[1:]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross entropy over tokens; every sample has equally many, so it is the mean over samples as well."""
    tokens, targets = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as Llama's (arXiv:2302.13971, section 2.3), with a larger rate for a smaller model."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


TP_PLAN = {
    "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "layers.*.attention_norm": SequenceParallel(),
    # The second input, the rotary positions, stays as it is.
    "layers.*.attention": PrepareModuleInput(input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)),
    "layers.*.attention.wq": ColwiseParallel(),
    "layers.*.attention.wk": ColwiseParallel(),
    "layers.*.attention.wv": ColwiseParallel(),
    "layers.*.attention.wo": RowwiseParallel(output_layouts=Shard(1)),
    "layers.*.ffn_norm": SequenceParallel(),
    "layers.*.feed_forward": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
    "layers.*.feed_forward.w1": ColwiseParallel(),
    "layers.*.feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
    "layers.*.feed_forward.w3": ColwiseParallel(),
    "norm": SequenceParallel(),
    "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}
"""Megatron-LM's tensor parallelism (arXiv:1909.08053) with its sequence parallelism (arXiv:2205.05198)."""

FSDP_UNITS = ("layers.*",)


def build_model(seed: int) -> Llama:
    """The same model on every rank that gives the same seed."""
    torch.manual_seed(seed)
    return Llama()


def apply_tp(model: Llama, mesh: DeviceMesh) -> None:
    """Split `model` over the mesh's only axis, in place."""
    parallelize_module(model, mesh, TP_PLAN)


def apply_fsdp(model: Llama, mesh: DeviceMesh) -> None:
    """Shard `model` over the mesh's only axis, in place, each block by itself and then what is around them."""
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


data = Windows(TEXT)

experiment = sp.Experiment(
    model=Llama,
    data=data,
    loss=loss,
    optimizer=optimizer,
    batch_size=8,
    max_grad_norm=1.0,
    tp_plan=TP_PLAN,
    fsdp_units=FSDP_UNITS,
)

training = sp.Training(max_duration="200ba")
"""How `shardproof train` trains it."""
