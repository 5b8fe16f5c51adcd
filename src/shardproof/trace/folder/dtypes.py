"""The dtypes of tensors in a recording: what its index and what safetensors call them."""

from __future__ import annotations

import torch

from shardproof.trace import dtypes

SAFETENSORS: dict[torch.dtype, str] = {
    **dtypes.SAFETENSORS,
    # safetensors learned these late or not at all. Their bytes are named as what they are; the index knows more.
    torch.float8_e4m3fnuz: "U8",
    torch.float8_e5m2fnuz: "U8",
    torch.float8_e8m0fnu: "U8",
}
"""What safetensors calls each dtype. Complex ones are kept as pairs of reals."""

NAMES: dict[torch.dtype, str] = {dtype: str(dtype).removeprefix("torch.") for dtype in SAFETENSORS}
"""What an index calls each dtype: as torch does."""

BY_NAME: dict[str, torch.dtype] = {name: dtype for dtype, name in NAMES.items()}
