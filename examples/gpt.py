"""A small decoder language model on real text, byte by byte: Python's own language reference (no download).

    shardproof check examples/gpt.py --ranks 4                       # heads, MLP and vocabulary split over tp
    shardproof check examples/gpt.py:sequence_parallel --ranks 4     # norms and residuals split over the sequence too
    shardproof check examples/gpt.py:ragged --ranks 4                # samples with unequal numbers of tokens

    shardproof train examples/gpt.py --strategy tp_fsdp --ranks 4 --export gpt.safetensors
    python examples/gpt.py gpt.safetensors "The following "          # go on with this text

The text is `pydoc_data.topics` of the standard library, so it differs a little between versions of Python.
"""

import math
import sys
from dataclasses import replace
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)
from torch.utils.data import Dataset

import shardproof as sp

VOCABULARY = 256  # bytes
LENGTH = 32  # tokens of a sample
WIDTH, HEADS, LAYERS = 64, 8, 2
HEAD_DIM = WIDTH // HEADS
"""2, 4 or 8 tensor-parallel ranks divide the vocabulary, the length, the heads and the MLP."""

INIT_STD = 0.02  # GPT-2's, also for the embedding, which is the output head as well


class Attention(nn.Module):
    """Causal attention of as many heads as the projections' columns hold: all of them, or this rank's."""

    def __init__(self) -> None:
        super().__init__()
        # The key's bias adds the same number to all scores of a query, which softmax ignores: its gradient is zero.
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, WIDTH)
        self.v_proj = nn.Linear(WIDTH, WIDTH)
        self.o_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, WIDTH) -> (batch, length, WIDTH)
        q, k, v = (split_heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, length, HEAD_DIM)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def split_heads(x: Tensor) -> Tensor:  # (batch, length, heads * HEAD_DIM) -> (batch, heads, length, HEAD_DIM)
    """Raises RuntimeError where a rank's columns are no whole number of heads."""
    batch, length, width = x.shape
    return x.view(batch, length, width // HEAD_DIM, HEAD_DIM).transpose(1, 2)


class Mlp(nn.Module):
    """Four times as wide inside, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, WIDTH) -> (batch, length, WIDTH)
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, WIDTH) -> (batch, length, WIDTH)
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Gpt(nn.Module):
    """Token and learned position embeddings, blocks, norm, and a head tied to the token embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(VOCABULARY, WIDTH)
        self.pos_emb = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tok_emb.weight  # arXiv:1608.05859
        # Biases of exactly 0 and norms of exactly 1 would hide a bias that is added twice or a norm that is dropped.
        for name, parameter in self.named_parameters():
            is_scale = name.endswith("norm.weight")
            nn.init.normal_(parameter, mean=float(is_scale), std=0.1 if is_scale else INIT_STD)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, length) -> (batch, length, VOCABULARY)
        # A row of its own for the batch, so that a plan can split tokens and positions alike, along dim 1.
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)  # (1, length)
        x = self.tok_emb(tokens) + self.pos_emb(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


TEXT = "\n".join(topics[name] for name in sorted(topics)).encode()
TRAIN_BYTES = len(TEXT) * 9 // 10


class Windows(Dataset):
    """Text cut into windows of equal length: (tokens, next tokens), both (LENGTH,)."""

    def __init__(self, text: bytes) -> None:
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.windows = tokens.unfold(0, LENGTH + 1, LENGTH)  # (samples, LENGTH + 1); neighbours share one token

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.windows[index].long()
        return window[:-1], window[1:]


class Lines(Dataset):
    """Lines of text, cut or padded to LENGTH: {"tokens", "targets", "mask"}, all (LENGTH,), mask false on padding."""

    def __init__(self, text: bytes) -> None:
        # Two bytes at least: one to read and one to predict.
        self.lines = [line for line in map(bytes.strip, text.splitlines()) if len(line) > 1]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        line = self.lines[index][: LENGTH + 1]
        window = torch.tensor(list(line.ljust(LENGTH + 1, b"\0")))
        return {"tokens": window[:-1], "targets": window[1:], "mask": torch.arange(LENGTH) < len(line) - 1}


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross entropy over tokens; every sample has equally many, so it is the mean over samples as well."""
    tokens, targets = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def masked_loss(model: nn.Module, batch: dict[str, Tensor]) -> sp.LossSum:
    """Cross entropy summed over the tokens that count, and their number: a mean of the ranks' means would be wrong."""
    logits = model(batch["tokens"]).flatten(0, 1)  # (batch * LENGTH, VOCABULARY)
    losses = F.cross_entropy(logits, batch["targets"].flatten(), reduction="none")
    mask = batch["mask"].flatten()
    return sp.LossSum(total=(losses * mask).sum(), count=mask.sum())


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW that decays matrices only, betas as in GPT-3 (arXiv:2005.14165, appendix B)."""
    # By name, as a parameter's shape depends on how it is sharded.
    matrices, vectors = [], []
    for name, parameter in model.named_parameters():
        (vectors if name.endswith("bias") or "norm" in name else matrices).append(parameter)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


TP_PLAN = {
    # Embedding and head both split the vocabulary, dim 0 of their weight, so that they can stay one tensor.
    "tok_emb": RowwiseParallel(input_layouts=Replicate()),
    "blocks.*.attn.q_proj": "colwise",
    "blocks.*.attn.k_proj": "colwise",
    "blocks.*.attn.v_proj": "colwise",
    "blocks.*.attn.o_proj": "rowwise",
    "blocks.*.mlp.fc1": "colwise",
    "blocks.*.mlp.fc2": "rowwise",
    "head": ColwiseParallel(output_layouts=Replicate()),
}
"""Megatron-LM section 3, arXiv:1909.08053; position embedding and norms are whole on every rank."""

SEQUENCE_PARALLEL_PLAN = {
    "tok_emb": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "pos_emb": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "blocks.*.attn_norm": SequenceParallel(),
    "blocks.*.attn": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
    "blocks.*.attn.q_proj": "colwise",
    "blocks.*.attn.k_proj": "colwise",
    "blocks.*.attn.v_proj": "colwise",
    "blocks.*.attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
    "blocks.*.mlp_norm": SequenceParallel(),
    "blocks.*.mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
    "blocks.*.mlp.fc1": "colwise",
    "blocks.*.mlp.fc2": RowwiseParallel(output_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}
"""Between attention and MLP each rank holds its part of the sequence: arXiv:2205.05198, written as torchtitan does."""

test_data = Windows(TEXT[TRAIN_BYTES:])

experiment = sp.Experiment(
    model=Gpt,
    data=Windows(TEXT[:TRAIN_BYTES]),
    loss=mean_loss,
    optimizer=optimizer,
    batch_size=16,
    max_grad_norm=1.0,
    tp_plan=TP_PLAN,
    fsdp_units=("blocks.*",),
)

sequence_parallel = replace(experiment, tp_plan=SEQUENCE_PARALLEL_PLAN)

ragged = replace(experiment, data=Lines(TEXT[:TRAIN_BYTES]), loss=masked_loss)

STEPS, WARMUP = 600, 30


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then a cosine down to a tenth, as GPT-3's (arXiv:2005.14165, appendix B)."""

    def factor(step: int) -> float:
        if step < WARMUP:
            return (step + 1) / WARMUP
        done = min(1.0, (step - WARMUP) / (STEPS - WARMUP))
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


training = sp.Training(max_duration=f"{STEPS}ba", eval_data=test_data, scheduler=schedule)
"""How `shardproof train` trains all of them; options on the command line replace parts of it."""


@torch.no_grad()
def sample(model: nn.Module, prompt: str, length: int = 200, temperature: float = 0.8, seed: int = 0) -> str:
    """`prompt` and `length` bytes more, drawn one by one from what the model makes of the LENGTH bytes before."""
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt.encode())
    for _ in range(length):
        logits = model(torch.tensor([tokens[-LENGTH:]]))[0, -1] / temperature
        tokens.append(int(torch.multinomial(logits.softmax(0), 1, generator=generator)))
    return bytes(tokens).decode(errors="replace")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/gpt.py WEIGHTS.safetensors PROMPT")
    gpt = Gpt()
    gpt.load_state_dict(load_file(sys.argv[1]))
    print(sample(gpt, sys.argv[2]))
