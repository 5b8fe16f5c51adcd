"""Random numbers that do not depend on how many ranks draw them."""

from __future__ import annotations

import random
import sys
import zlib
from functools import lru_cache

import torch


def seed_everything(*parts: int) -> None:
    """Seed Python, NumPy (where it is loaded) and torch, on every device, from a few whole numbers."""
    seed = _mixed(parts)
    if torch.backends.cuda.is_built() and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        # It remembers the seed for devices that are not in use yet; where there are none, that costs 90 us a step.
        torch.manual_seed(seed)
    else:
        _seed_torch(seed)
    _seed_others(seed)


def _seed_torch(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


def _mixed(parts: tuple[int, ...]) -> int:
    seed = 0
    for part in parts:
        # splitmix64's finaliser (Steele, Lea, Flood 2014): neighbouring inputs give unrelated seeds.
        seed = (seed + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        seed ^= seed >> 31
    return seed


def _seed_others(seed: int) -> None:
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


_SAMPLES = int.from_bytes(b"sample")
"""Keeps what samples draw apart from what training steps draw, which are numbered from 0 as well."""


def seed_sample(seed: int, epoch: int, index: int) -> None:
    """Seed everything for one sample, so that what it draws depends on nothing but `seed`, `epoch` and `index`.

    As `seed_everything`, without a word to devices that are not in use yet.
    """
    mixed = _mixed((seed, _SAMPLES, epoch, index))
    _seed_torch(mixed)
    _seed_others(mixed)


@lru_cache(maxsize=16)
def _unused(seed: int) -> int:
    """Fingerprint of torch's generator just after it was seeded."""
    return zlib.crc32(torch.Generator().manual_seed(seed).get_state().numpy().data)


def generators(device: torch.device) -> int:
    """Fingerprint of every generator that a model on `device` may draw from: changes when one of them is drawn from.

    torch's own may be seeded anew without a change: what nobody has drawn from yet looks the same under every seed.
    """
    return hash(generator_states(device))


def generator_states(device: torch.device) -> tuple[int, int, int]:
    """The same for torch's, NumPy's and Python's generators apart."""
    found = zlib.crc32(torch.get_rng_state().numpy().data)
    if found == _unused(torch.initial_seed()):
        found = 0
    if device.type == "cuda":
        found = zlib.crc32(torch.cuda.get_rng_state(device).numpy().data, found)
    numpy = 0
    if "numpy" in sys.modules:
        _, keys, at, *_ = sys.modules["numpy"].random.get_state()
        numpy = hash((zlib.crc32(keys.data), at))
    # Python hashes whole numbers alike in every process; torch's and NumPy's states are long, and faster as bytes.
    return found, numpy, hash(random.getstate()[1])
