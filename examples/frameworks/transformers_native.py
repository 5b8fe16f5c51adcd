"""transformers' own layouts: a small Llama with weights at random, loaded from a folder with a `DistributedConfig`.

With ranks of its own, or with those of torchrun:

    python examples/frameworks/transformers_native.py --layout tp_fsdp
    torchrun --nproc-per-node 4 examples/frameworks/transformers_native.py --layout tp_fsdp
"""

import sys
import tempfile
from argparse import Namespace

import torch
import torch.distributed as dist
from task import GLOBAL_BATCH, STEPS, batches, launch, options, record, report
from torch import nn
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, logging
from transformers.distributed import DistributedConfig

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=32,
    tie_word_embeddings=False,
    use_cache=False,
)
"""Four tensor-parallel ranks divide vocabulary, heads and MLP."""

LAYOUTS = ("single", "fsdp", "tp", "tp_auto", "tp_fsdp")

MISTAKES = {"data-over-world": ("tp", "tp_auto", "tp_fsdp"), "accumulate-twice": LAYOUTS}


def tokens() -> TensorDataset:
    """Sequences for all steps, (24, 12)."""
    draw = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randint(CONFIG.vocab_size, (GLOBAL_BATCH * STEPS, 12), generator=draw))


def llama(dtype: torch.dtype) -> nn.Module:
    """The same weights in every layout and on every rank."""
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).to(dtype).train()


def sharding(layout: str, ranks: int) -> DistributedConfig:
    """What from_pretrained is told about the layout."""
    if layout == "tp_auto":
        return DistributedConfig(tp_plan="auto")
    tp = {"fsdp": 1, "tp": ranks, "tp_fsdp": 2}[layout]
    return DistributedConfig(tp_size=tp, fsdp_size=ranks // tp)


def load(given: Namespace) -> nn.Module:
    """Rank 0 writes the weights, every rank loads its shards of them."""
    if given.layout in {"single", "ddp"}:
        return llama(given.dtype)
    with tempfile.TemporaryDirectory() as folder:
        at = [folder]
        dist.broadcast_object_list(at)
        if dist.get_rank() == 0:
            llama(given.dtype).save_pretrained(at[0])
        dist.barrier()
        config = sharding(given.layout, given.ranks)
        model = LlamaForCausalLM.from_pretrained(at[0], dtype=given.dtype, distributed_config=config)
        dist.barrier()
    return model.train()


def train(given: Namespace) -> None:
    """Three steps; the loss is computed inside the model's forward, from `labels`."""
    logging.disable_progress_bar()
    if given.layout != "single":
        dist.init_process_group("gloo")
    model = load(given)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    with record(given, model, optimizer):
        for step, micro_batches in enumerate(batches(tokens(), given)):
            optimizer.zero_grad()
            total = torch.zeros((), dtype=given.dtype)
            for (ids,) in micro_batches:
                loss = model(input_ids=ids, labels=ids).loss / given.accumulate
                total += loss.detach()
                if given.mistake == "accumulate-twice":
                    loss = loss / given.accumulate
                loss.backward()
            optimizer.step()
            report(step, total)


if __name__ == "__main__":
    launch(train, options(__doc__, LAYOUTS, MISTAKES, sys.argv[1:]))
