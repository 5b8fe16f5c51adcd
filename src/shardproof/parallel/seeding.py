"""Random numbers that do not depend on how many ranks draw them."""

from __future__ import annotations

import random
import sys

import torch


def seed_everything(*parts: int) -> None:
    """Seed Python, NumPy (where it is loaded) and torch, on every device, from a few whole numbers."""
    seed = 0
    for part in parts:
        # splitmix64's finaliser (Steele, Lea, Flood 2014): neighbouring inputs give unrelated seeds.
        seed = (seed + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        seed ^= seed >> 31
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def generator_state(device: torch.device) -> torch.Tensor:
    """State of the generator that a model on `device` draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
