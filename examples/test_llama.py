"""The Llama computes what a Llama computes, and trains in anybody's own loop."""

import torch
import torch.nn.functional as F
from llama import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LENGTH,
    VOCABULARY,
    Attention,
    build_model,
    data,
    experiment,
    rotate,
    rotation,
)

import shardproof as sp


def test_every_layout_trains_alike():
    report = sp.check(experiment, strategies=("ddp", "fsdp", "tp", "tp_fsdp"), ranks=4, steps=1)
    assert report.ok, str(report)


def test_turned_positions_show_only_how_far_apart_they_are():
    query, key = torch.randn(2, 1, 1, 1, HEAD_DIM, dtype=torch.float64).expand(2, 1, LENGTH, 1, HEAD_DIM)
    by = rotation(LENGTH).double()
    scores = torch.einsum("bqhd,bkhd->qk", rotate(query, by), rotate(key, by))
    for apart in range(LENGTH):
        diagonal = scores.diagonal(apart)
        # The angles' cosines and sines were rounded to float32.
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)


def test_two_query_heads_share_a_key_and_a_value_head():
    torch.manual_seed(0)
    attention, x, by = Attention().double(), torch.randn(2, LENGTH, 64, dtype=torch.float64), rotation(LENGTH).double()
    with torch.no_grad():
        attention.wv.weight[:HEAD_DIM] = 0
        # So that the output shows the heads themselves.
        attention.wo.weight.copy_(torch.eye(64))
    heads = attention(x, by).unflatten(-1, (HEADS, HEAD_DIM))
    shared = HEADS // KV_HEADS
    assert not heads[:, :, :shared].any()
    assert (heads[:, :, shared:] != 0).all()


def test_no_position_sees_what_comes_after_it():
    model = build_model(seed=0)
    tokens = data[0][0][None]
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % VOCABULARY
    first, second = model(tokens), model(changed)
    assert torch.equal(first[:, :-1], second[:, :-1])
    assert not torch.equal(first[:, -1], second[:, -1])


def test_a_loop_of_ones_own_needs_nothing_of_shardproof():
    model = build_model(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(8):
        tokens, targets = torch.utils.data.default_collate([data[step * 8 + sample] for sample in range(8)])
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
