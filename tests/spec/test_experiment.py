"""The description of what is trained."""

from __future__ import annotations

import shardproof as sp


def test_none_says_the_same_as_no_plan_and_no_units() -> None:
    experiment = sp.Experiment(
        model=dict, data=[1], loss=max, optimizer=list, batch_size=8, tp_plan=None, fsdp_units=None
    )
    assert experiment.tp_plan == {}
    assert experiment.fsdp_units == ()
