"""A 64-bit checksum of the bits of a tensor, made where the tensor lies: what ranks exchange to compare replicas.

The checksum is the multilinear hash: the tensor's bits are read as words of at most 32 bits, each word is multiplied
by a fixed random odd number of 64 bits, and the products are added modulo 2**64. One word that differs always shows,
as an odd number divides nothing away; tensors that differ in more words share a checksum with a chance of at most
2**-32 (Lemire and Kaser, "Strongly universal string hashing is fast", arXiv:1202.4961). Plain sums of the bits would
not do: two signs that flip cancel each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

CHUNK = 2**18
"""Words multiplied at once: the products of a chunk take 2 MiB, whatever the size of the model."""

SEED = 20_220_202
"""The same on every rank and machine, or checksums would have nothing in common."""

STRIDE = 0x5851F42D4C957F2D
"""Multiplier between the chunks of one tensor (Knuth's MMIX), so that two chunks that change places show."""

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""Bytes of an element -> the words that its bits are read as. Eight bytes are two words: a sign must not lie at the
top of 64 bits, where an even number of flips adds up to nothing."""


def words(tensor: Tensor) -> Tensor:
    """The bits of a plain tensor as a flat tensor of whole numbers, on its own device; a view where it can be one."""
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg().reshape(-1).view(WORDS[tensor.element_size()])


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are the same bit by bit: NaN is itself, and -0.0 is not 0.0."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(words(first), words(second))


@torch.no_grad()
def checksums(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """One checksum for each of the plain `tensors`, shape (number of tensors,), int64, on `device`.

    0 for a tensor whose bits are all 0, and for an empty one. Nothing waits for the device. Small tensors are put
    together and summed at once: a model has hundreds of them, and a call for each would take longer than the sums.
    """
    found: list[tuple[list[int], Tensor]] = []
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for number, tensor in enumerate(tensors):
        flat = words(tensor)
        if flat.numel() > CHUNK:
            found.append(([number], _long(flat)))
        elif flat.numel():
            kinds.setdefault((flat.device, flat.dtype), []).append((number, flat))
    for own in kinds.values():
        for some in _bins(own):
            numbers = [number for number, _ in some]
            found.append((numbers, _short([flat for _, flat in some])))
    if not found:
        return torch.zeros(len(tensors), dtype=torch.int64, device=device)
    order = torch.tensor([number for numbers, _ in found for number in numbers], device=device)
    values = torch.cat([sums.to(device) for _, sums in found])
    return torch.zeros(len(tensors), dtype=torch.int64, device=device).index_copy_(0, order, values)


def _bins(flats: Iterable[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Tensors in groups of at most `CHUNK` words."""
    some: list[tuple[int, Tensor]] = []
    size = 0
    for number, flat in flats:
        if size + flat.numel() > CHUNK:
            yield some
            some, size = [], 0
        some.append((number, flat))
        size += flat.numel()
    if some:
        yield some


def _short(flats: list[Tensor]) -> Tensor:
    """The checksums of tensors that together fit a chunk, shape (number of tensors,)."""
    factors = _factors(flats[0].device)
    sizes = [flat.numel() for flat in flats]
    products = torch.cat(flats) * torch.cat([factors[:size] for size in sizes])
    # Sums modulo 2**64 may be taken apart again: each tensor's is a difference of two running sums.
    ends = torch.tensor(sizes).cumsum(0) - 1
    running = products.cumsum(0)[ends.to(products.device)]
    return torch.diff(running, prepend=running.new_zeros(1))


def _long(flat: Tensor) -> Tensor:
    """The checksum of a tensor of more than a chunk, shape (1,)."""
    factors = _factors(flat.device)
    total = torch.zeros(1, dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), CHUNK):
        chunk = flat[start : start + CHUNK]
        total = total * STRIDE + (chunk * factors[: chunk.numel()]).sum()
    return total


@cache
def _factors(device: torch.device) -> Tensor:
    """`CHUNK` random odd numbers, from a generator of their own: a training run's draws are its own business."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(-(2**63), 2**63 - 1, (CHUNK,), generator=generator, dtype=torch.int64)
    return (drawn | 1).to(device)
