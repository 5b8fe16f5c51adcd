"""Weights or optimizer state that were loaded, or changed, between two steps."""

from __future__ import annotations

from dataclasses import replace

import torch

from shardproof.compare.measure import wide
from shardproof.diagnose import layout
from shardproof.diagnose.case import Case, Diagnosis

FIX = (
    "save and load with torch.distributed.checkpoint (get_state_dict, set_state_dict), which knows where every shard "
    "belongs, and restore optimizer, scheduler and generators with the weights"
)


def reloaded(case: Case) -> Diagnosis | None:
    """What a step began with is not what the step before it left."""
    first = case.first
    moved = layout.of_parameter(case)
    said = [f"step {first.step + 1} began with another {_kind(case)} than step {first.step} left"]
    if moved is not None:
        said.append(moved.evidence)
    elif _zero(case):
        said.append("it is all zero: the state was lost")
    made = Diagnosis(cause="checkpoint", evidence="; ".join(said), fix=FIX)
    return made if moved is None else replace(made, axis=moved.axis)


def _kind(case: Case) -> str:
    return f"{case.first.part} of {case.first.name}" if case.first.part else case.first.name


def _zero(case: Case) -> bool:
    held = case.shares(case.first)
    want = case.reference.tensors(case.first.key)
    here = [share for share in held if share.rank in case.first.ranks]
    return (
        bool(want)
        and bool(here)
        and all(not bool(s.got.any()) and bool(torch.any(s.take(wide(want[0])))) for s in here)
    )
