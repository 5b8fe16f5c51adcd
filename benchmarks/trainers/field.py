"""Who takes part, by name, in the order of the table."""

from __future__ import annotations

from collections.abc import Mapping

from trainers.accelerated import Accelerate
from trainers.by_hand import ByHand
from trainers.contestant import Contestant
from trainers.fabric import Fabric
from trainers.hf_trainer import HfTrainer
from trainers.lightning_trainer import Lightning
from trainers.native_transformers import Transformers
from trainers.ours import Ours

BASE = "by hand"

AGAIN = "by hand again"
"""The same loop a second time: how far its ratio is from 1 is what the measurement itself is good to."""

FIELD: Mapping[str, type[Contestant]] = {
    BASE: ByHand,
    AGAIN: ByHand,
    "shardproof": Ours,
    "fabric": Fabric,
    "lightning": Lightning,
    "transformers": Transformers,
    "hf trainer": HfTrainer,
    "accelerate": Accelerate,
}

PACKAGES: Mapping[str, str] = {
    "fabric": "lightning",
    "lightning": "lightning",
    "transformers": "transformers",
    "hf trainer": "transformers",
    "accelerate": "accelerate",
}
"""What must be installed for a contestant to take part."""

IMPORTS: Mapping[str, tuple[str, ...]] = {
    "lightning": ("lightning", "lightning.fabric.strategies", "lightning.pytorch.strategies"),
    "transformers": (
        "transformers.trainer",
        "transformers.models.llama.modeling_llama",
        "transformers.distributed.fsdp",
    ),
    "accelerate": ("accelerate",),
}
"""What to load of each package before ranks are forked, so that neither time nor memory of the import is counted."""
