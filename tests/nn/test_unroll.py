"""The fused layer against the plain loop, values and gradients, over odd shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers

from unrolled.nn.cells import CELLS, Cell
from unrolled.nn.unroll import detach, unroll, unroll_fused, unroll_plain


@pytest.mark.parametrize("name", CELLS)
@given(T=integers(1, 9), B=integers(1, 7), E=integers(1, 33), H=integers(1, 37))
def test_fused_layer_agrees_with_plain_loop(name: str, T: int, B: int, E: int, H: int) -> None:
    torch.manual_seed(T + 10 * B + 100 * E + 1000 * H)
    cell = CELLS[name](E, H)
    torch.nn.init.uniform_(cell.bias_ih, -0.5, 0.5)
    results = []
    inputs = torch.randn(T, B, E)
    state = tuple(torch.randn(B, H) for _ in cell.initial_state(B))
    weights = torch.randn(T, B, H)
    for way in (unroll_plain, unroll_fused):
        x, s = inputs.clone().requires_grad_(), tuple(part.clone().requires_grad_() for part in state)
        outputs, after = way(cell, x, s)
        objective = (outputs * weights).sum() + sum(part.square().sum() for part in after)
        gradients = torch.autograd.grad(objective, [x, *s, *cell.parameters()])
        results.append([outputs, *after, *gradients])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5 * max(1.0, plain.abs().max().item()))


@pytest.mark.parametrize("name", CELLS)
def test_two_windows_are_one_long_window(name: str) -> None:
    cell = CELLS[name](5, 6)
    inputs = torch.randn(10, 3, 5)
    whole, end = unroll(cell, inputs, cell.initial_state(3))
    first, middle = unroll(cell, inputs[:4], cell.initial_state(3))
    second, last = unroll(cell, inputs[4:], middle)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    for a, b in zip(last, end, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_stop_at_a_detached_state() -> None:
    cell = CELLS["lstm"](2, 3)
    earlier = torch.randn(4, 1, 2, requires_grad=True)
    _, state = unroll(cell, earlier, cell.initial_state(1))
    (cut,) = detach((state,))
    outputs, _ = unroll(cell, torch.randn(4, 1, 2), cut)
    outputs.sum().backward()
    assert earlier.grad is None
    assert [part.tolist() for part in cut] == [part.tolist() for part in state]


def test_a_cell_that_torch_does_not_have_is_refused() -> None:
    class Other(Cell):
        gates = 1

        def initial_state(self, batch_size: int) -> tuple[torch.Tensor, ...]:
            return (torch.zeros(batch_size, self.hidden_size),)

        def forward(
            self, inputs: torch.Tensor, state: tuple[torch.Tensor, ...]
        ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            output = (inputs @ self.weight_ih.T + state[0] @ self.weight_hh.T + self.bias_ih).tanh()
            return output, (output,)

    cell = Other(2, 3)
    with pytest.raises(TypeError, match="no fused layer for Other"):
        unroll_fused(cell, torch.randn(4, 1, 2), cell.initial_state(1))
    outputs, _ = unroll(cell, torch.randn(4, 1, 2), cell.initial_state(1))
    assert outputs.shape == (4, 1, 3)
