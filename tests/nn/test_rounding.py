"""bf16 on PyTorch alone, on a processor that multiplies it and on one that does not."""

from collections.abc import Iterator

import pytest
import torch

from unrolled.kernels import build
from unrolled.nn import rounding
from unrolled.nn.cells import CELLS
from unrolled.nn.unroll import unroll, unroll_plain


@pytest.fixture(params=["as it is", "without bf16"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "without bf16":
        monkeypatch.setattr(rounding, "is_native", lambda: False)
    with build.switched_off():
        yield


@pytest.mark.usefixtures("processor")
def test_a_product_of_bf16_sums_in_f32() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(7, 600).bfloat16(), torch.randn(600, 5).bfloat16()
    expected = a.double() @ b.double()
    found = rounding.product(a, b)
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() < 2**-8 * expected.norm()


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("name", ["lstm", "gru", "elman"])
@pytest.mark.parametrize("training", [False, True])
def test_a_layer_in_bf16_is_nearly_the_plain_loop(name: str, training: bool) -> None:
    torch.manual_seed(1)
    cell, inputs = CELLS[name](20, 33).train(training), torch.randn(6, 5, 20)
    torch.nn.init.uniform_(cell.bias_ih, -0.5, 0.5)
    results = []
    for bf16 in (False, True):
        x, state = inputs.clone().requires_grad_(), tuple(torch.ones_like(part) for part in cell.initial_state(5))
        leaves = [x, *(part.requires_grad_() for part in state)]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs, after = (unroll if bf16 else unroll_plain)(cell, x, state)
        assert {part.dtype for part in after} == {torch.float32}
        nll = outputs.float().square().sum() + sum(part.square().sum() for part in after)
        results.append([outputs, *after, *torch.autograd.grad(nll, [*leaves, *cell.parameters()])])
    for plain, rounded in zip(*results, strict=True):
        assert (rounded - plain).norm() <= 0.02 * plain.norm()
        assert not torch.equal(rounded, plain)
