"""The dtypes of tensors in a recording: what its index and what safetensors call them."""

from __future__ import annotations

import torch

SAFETENSORS: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    # safetensors learned these late or not at all. Their bytes are named as what they are; the index knows more.
    torch.float8_e4m3fnuz: "U8",
    torch.float8_e5m2fnuz: "U8",
    torch.float8_e8m0fnu: "U8",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls each dtype. Complex ones are kept as pairs of reals."""

NAMES: dict[torch.dtype, str] = {dtype: str(dtype).removeprefix("torch.") for dtype in SAFETENSORS}
"""What an index calls each dtype: as torch does."""

BY_NAME: dict[str, torch.dtype] = {name: dtype for dtype, name in NAMES.items()}
