"""The fused layer against the plain loop, values and gradients, over odd shapes."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import booleans, integers

from unrolled.nn.cells import CELLS
from unrolled.nn.unroll import Unroll, detach, unroll, unroll_fused, unroll_plain, unroll_projected

FAST: list[tuple[str, Unroll, bool]] = [
    *[(name, unroll_projected, True) for name in CELLS],
    *[(name, unroll_projected, False) for name in CELLS if name != "jordan"],
    *[(name, unroll_fused, False) for name in ("lstm", "gru", "elman")],
    *[(name, way, False) for name in ("lstm, add", "elman, add") for way in (unroll_projected, unroll_fused)],
]


@pytest.mark.parametrize(("name", "fast", "one_hot"), FAST)
@given(T=integers(1, 9), B=integers(1, 7), E=integers(1, 33), H=integers(1, 37), training=booleans())
def test_the_fast_way_agrees_with_the_plain_loop(
    name: str, fast: Unroll, one_hot: bool, T: int, B: int, E: int, H: int, training: bool
) -> None:
    torch.manual_seed(T + 10 * B + 100 * E + 1000 * H)
    kind, _, join = name.partition(", ")
    options: dict[str, Any] = {"join": join} if join else {}
    cell = CELLS[kind](E, H, **options).train(training)
    cell.reset_parameters(0.5, draw_biases=True)
    results = []
    inputs = torch.randint(E, (T, B)) if one_hot else torch.randn(T, B, E)
    state = tuple(torch.randn_like(part) for part in cell.initial_state(B))
    weights = torch.randn(T, B, E if cell.decodes else H)
    for way in (unroll_plain, fast):
        x = inputs if one_hot else inputs.clone().requires_grad_()
        s = tuple(part.clone().requires_grad_() for part in state)
        outputs, after = way(cell, x, s)
        objective = (outputs * weights).sum() + sum(part.square().sum() for part in after)
        given_values = [*s, *cell.parameters(), *([] if one_hot else [x])]
        gradients = torch.autograd.grad(objective, given_values, allow_unused=True, materialize_grads=True)
        results.append([outputs, *after, *gradients])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5 * max(1.0, plain.abs().max().item()))


@pytest.mark.parametrize("name", CELLS)
def test_two_windows_are_one_long_window(name: str) -> None:
    cell = CELLS[name](5, 6).eval()
    inputs = torch.randint(5, (10, 3))
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


def test_what_torch_has_no_fused_layer_for_is_refused() -> None:
    jordan, lstm = CELLS["jordan"](2, 3), CELLS["lstm"](2, 3)
    with pytest.raises(TypeError, match="no fused layer for Jordan"):
        unroll_fused(jordan, torch.randn(4, 1, 2), jordan.initial_state(1))
    with pytest.raises(TypeError, match="take vectors, not ids"):
        unroll_fused(lstm, torch.zeros(4, 1, dtype=torch.int64), lstm.initial_state(1))
    for streams in (1, 2, 30):
        with pytest.raises(ValueError, match="the state is not that of 3 streams of 3 units"):
            unroll_fused(lstm, torch.zeros(4, 3, 2), lstm.initial_state(streams))
