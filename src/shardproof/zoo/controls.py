"""Right code that looks like a bug: none of it may get a finding."""

from __future__ import annotations

from shardproof.spec.experiment import Experiment
from shardproof.zoo.entry import control
from shardproof.zoo.fixtures.decoder import decoder
from shardproof.zoo.fixtures.megatron import split_sequence
from shardproof.zoo.setting import Setting


@control(layout="tp_ddp")
def sequence_parallel_by_hand(setting: Setting) -> Experiment:
    """Megatron's sequence parallelism, with every partial gradient summed."""
    return decoder(setting, parallelize=split_sequence)
