"""The logs' own two tests, under their names, each with and without repeated samples."""

import pytest
from composer_mlp import mixed_inputs, replicated_batch, replicated_gradients, sharded_batch

import shardproof as sp

STRATEGIES = ("ddp", "fsdp", "tp_fsdp")


@pytest.mark.parametrize("replication", [2, None])
def test_tp_forward(replication):
    if replication:
        sp.assert_parity(replicated_batch, strategies=STRATEGIES, ranks=4)
        return

    # The log: "DDP and TP-FSDP outputs from the forward pass are not close enough".
    with pytest.raises(sp.ParityError, match="batch-differs-in-group"):
        sp.assert_parity(mixed_inputs, strategies=STRATEGIES, ranks=4)
    report = sp.check(mixed_inputs, strategies=STRATEGIES, ranks=4)
    assert [run.strategy for run in report.runs if not run.ok] == ["tp_fsdp"]
    assert report.first.stage == "batch"
    assert report.first.cause == "batch-differs-in-group"
    assert report.first.axis == "tp"
    assert report.first.step == 0


@pytest.mark.parametrize("replication", [2, None])
def test_tp_gradients(replication):
    if replication:
        # The log's test fails here, as it holds a whole gradient against a shard; the training was right.
        sp.assert_parity(replicated_gradients, strategies=STRATEGIES, ranks=4)
        return

    # The log: outputs agree on every rank, gradients of TP-FSDP are twice those of DDP.
    with pytest.raises(sp.ParityError, match="grad-scale"):
        sp.assert_parity(sharded_batch, strategies=STRATEGIES, ranks=4)
    report = sp.check(sharded_batch, strategies=STRATEGIES, ranks=4)
    assert [run.strategy for run in report.runs if not run.ok] == ["tp_fsdp"]
    assert report.first.stage == "gradient"
    assert report.first.cause == "grad-scale"
    assert report.first.axis == "tp"
    assert report.first.factor == pytest.approx(2.0)
    assert report.first.step == 0
