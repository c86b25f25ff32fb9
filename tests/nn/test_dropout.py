"""Dropout without the kernels: rate, scale, one mask forward and backward, masks that have nothing in common."""

import pytest
import torch

from unrolled.kernels import build
from unrolled.nn.dropout import Dropout


@pytest.mark.parametrize("p", [1e-6, 0.01, 0.35, 0.5, 0.999])
def test_a_share_of_p_is_zero_and_the_mean_stays(p: float) -> None:
    size, deviation = 1_000_001, (p * (1 - p) / 1_000_001) ** 0.5
    torch.manual_seed(0)
    x = torch.linspace(1, 2, size, requires_grad=True)
    with build.switched_off():
        dropped = Dropout(p)(x)
    (gradient,) = torch.autograd.grad(dropped.sum(), x)
    assert abs((gradient == 0).double().mean().item() - p) < 4 * deviation + 1 / 65536
    torch.testing.assert_close(dropped, x * gradient)
    kept = gradient[gradient != 0]
    assert kept.min() == kept.max() == pytest.approx(1 / (1 - p), rel=0.01)
    assert gradient.double().mean().item() == pytest.approx(1, abs=4 * deviation / (1 - p))


def test_masks_have_nothing_to_do_with_each_other() -> None:
    """Neither those of two steps, nor a mask with itself some places on; an estimate's deviation is 1 / sqrt(N)."""
    dropout, size = Dropout(0.5), 700 * 650
    with build.switched_off():
        torch.manual_seed(0)
        first, second = (dropout(torch.ones(size)) - 1 for _ in range(2))
        torch.manual_seed(0)
        assert torch.equal(first, dropout(torch.ones(size)) - 1)
    for shift in (0, 1, 650, 13_000):
        assert abs((first.roll(shift) * second).mean().item()) < 5 * size**-0.5
        assert shift == 0 or abs((first.roll(shift) * first).mean().item()) < 5 * size**-0.5


def test_without_training_nothing_is_dropped() -> None:
    x = torch.ones(100)
    with build.switched_off():
        assert torch.equal(Dropout(0.5).eval()(x), x)
        assert torch.equal(Dropout(0.0)(x), x)
