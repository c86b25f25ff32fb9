"""Dropout: a unit is zero with probability p, else divided by 1 - p."""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unrolled.kernels import ops


@final
class Dropout(nn.Module):
    """Srivastava et al. 2014, scaled in training so that evaluation needs none.

    On the CPU the mask comes from a hash of a seed and the place where kernels serve, many times faster than PyTorch's
    generator; the seed is drawn from that generator, so a resumed training drops the same units.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"a unit is dropped with a probability from 0 to below 1, not {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        if not ops.serves(x):
            return x * _mask(x, self.p)
        return ops.dropout(x, self.p, int(torch.randint(1 << 62, (), device="cpu")))

    def extra_repr(self) -> str:
        return f"{self.p:g}"


def _mask(x: Tensor, p: float) -> Tensor:
    """0 or 1 / (1 - p) for each, p to the nearest 65536th: two from one number of the generator, whose own way to ask
    for a coin, `F.dropout`'s, takes ten times as long."""
    kept = min(max(round((1 - p) * 65536), 1), 65536)
    pairs = torch.randint(-(1 << 31), 1 << 31, ((x.numel() + 1) // 2,), dtype=torch.int32, device="cpu")
    draws = pairs.view(torch.int16)
    return (draws[: x.numel()] <= kept - 32769).to(x.dtype).mul_(65536 / kept).view_as(x)


def dropout_plain(x: Tensor, p: float, seed: int) -> Tensor:
    """The oracle of the kernel: the same mask, by the same hash (MurmurHash3's last steps, twice)."""
    word = 0xFFFFFFFF

    def mixed(h: Tensor) -> Tensor:
        h = (h ^ (h >> 16)) * 0x85EBCA6B & word
        h = (h ^ (h >> 13)) * 0xC2B2AE35 & word
        return h ^ (h >> 16)

    places = torch.arange(x.numel())
    h = mixed(mixed((places + seed) & word) ^ (seed >> 32 & word))
    return torch.where(h >= int(p * 2**32), x.flatten() / (1 - p), 0.0).view_as(x)
