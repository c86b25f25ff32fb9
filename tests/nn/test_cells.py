"""Cells against torch.nn's, whose parameter names and gate order they have."""

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers
from torch import nn

from unrolled.nn.cells import CELLS, GRU, LSTM, Cell

THEIRS: dict[type[Cell], type[nn.LSTMCell | nn.GRUCell]] = {LSTM: nn.LSTMCell, GRU: nn.GRUCell}


@pytest.mark.parametrize("kind", THEIRS)
@given(B=integers(1, 5), E=integers(1, 9), H=integers(1, 9))
def test_a_cell_is_torchs_after_one_load_state_dict(kind: type[Cell], B: int, E: int, H: int) -> None:
    torch.manual_seed(B + 10 * E + 100 * H)
    ours, theirs = kind(E, H).double(), THEIRS[kind](E, H).double()
    nn.init.uniform_(ours.bias_ih)
    theirs.load_state_dict(ours.state_dict() | {"bias_hh": torch.zeros_like(ours.bias_ih)})
    inputs = torch.randn(B, E, dtype=torch.float64)
    state = tuple(torch.randn(B, H, dtype=torch.float64) for _ in ours.initial_state(B))
    output, after = ours(inputs, state)
    expected = theirs(inputs, state if len(state) > 1 else state[0])
    for mine, other in zip(after, expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    assert output is after[0]


@pytest.mark.parametrize("kind", CELLS.values())
def test_the_first_state_is_zero(kind: type[Cell]) -> None:
    for tensor in kind(3, 5).initial_state(2):
        assert tensor.shape == (2, 5)
        assert not tensor.any()


@pytest.mark.parametrize("kind", CELLS.values())
def test_weights_begin_within_the_scale_and_biases_at_zero(kind: type[Cell]) -> None:
    cell = kind(50, 60)
    cell.reset_parameters(0.05)
    for weight in (cell.weight_ih, cell.weight_hh):
        assert 0.049 < weight.abs().max() <= 0.05
        assert abs(weight.mean()) < 0.002
    assert not cell.bias_ih.any()


def test_the_forget_bias_is_on_the_forget_gate_alone() -> None:
    cell = LSTM(3, 4, forget_bias=1.5)
    cell.reset_parameters(0.1)
    assert cell.bias_ih.tolist() == [0.0] * 4 + [1.5] * 4 + [0.0] * 8
