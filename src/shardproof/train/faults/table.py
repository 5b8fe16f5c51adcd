"""Every fault that can be planted, in the order in which they are told."""

from __future__ import annotations

from shardproof.train.faults.data import PeersApart, Repeated
from shardproof.train.faults.fault import Fault
from shardproof.train.faults.forward import BiasOfEveryRank, NotSummed
from shardproof.train.faults.gradients import PartialOverTp, ScaledSubset, WrongNorm
from shardproof.train.faults.losses import LostMicrobatch, MeanOfMeans, NotReduced, Scaled
from shardproof.train.faults.optimizers import Forgotten, Stale
from shardproof.train.faults.weights import Disturbed, Garbled, Swapped

FAULTS: tuple[type[Fault], ...] = (
    PeersApart,
    Repeated,
    Swapped,
    Disturbed,
    NotSummed,
    BiasOfEveryRank,
    NotReduced,
    PartialOverTp,
    Scaled,
    ScaledSubset,
    LostMicrobatch,
    MeanOfMeans,
    WrongNorm,
    Forgotten,
    Stale,
    Garbled,
)
"""One class a fault; in the causal order of the stages at which they show."""
