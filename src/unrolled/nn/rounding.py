"""bf16 on PyTorch alone: its own products where it has them, else f32 products of operands rounded to bf16.

On a processor without AVX-512 PyTorch refuses an LSTM in bf16, and takes up to a thousand times as long for a product
of bf16 matrices as for one of f32.
"""

from functools import cache

import torch
from torch import Tensor


@cache
def is_native() -> bool:
    """Whether PyTorch's CPU side, oneDNN, multiplies bf16 on this processor."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def is_asked(kind: str) -> bool:
    """Whether autocast is on for this kind of device, to bf16 and nothing else."""
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16


def rounded(x: Tensor) -> Tensor:
    """The values that bf16 has for these, in f32."""
    return x.bfloat16().float()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of bf16 matrices, summed in f32, rounded to bf16."""
    if is_native() or a.device.type != "cpu":
        return a @ b
    return (a.float() @ b.float()).bfloat16()
