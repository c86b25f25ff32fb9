"""Cells against torch.nn's, whose parameter names and gate order they have."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers
from torch import Tensor, nn
from torch.nn import functional as F

from unrolled.nn.cells import CELLS, GRU, LSTM, Cell, Elman, Jordan

CASES: dict[str, tuple[Callable[[int, int], Cell], Callable[[int, int], nn.RNNCellBase]]] = {
    "lstm": (LSTM, nn.LSTMCell),
    "lstm-add": (partial(LSTM, join="add"), nn.LSTMCell),
    "gru": (GRU, nn.GRUCell),
    "elman": (Elman, nn.RNNCell),
    "elman-relu": (partial(Elman, activation="relu"), partial(nn.RNNCell, nonlinearity="relu")),
    "elman-add": (partial(Elman, join="add"), nn.RNNCell),
}


@pytest.mark.parametrize("case", CASES)
@given(B=integers(1, 5), E=integers(1, 9), H=integers(1, 9))
def test_a_cell_is_torchs_after_one_load_state_dict(case: str, B: int, E: int, H: int) -> None:
    torch.manual_seed(B + 10 * E + 100 * H)
    ours, theirs = (make(E, H).double() for make in CASES[case])
    assert isinstance(ours, Cell)
    for parameter in ours.parameters():
        nn.init.uniform_(parameter)
    theirs.load_state_dict({"bias_hh": torch.zeros_like(ours.bias_ih)} | ours.state_dict())
    inputs = torch.randn(B, E, dtype=torch.float64)
    state = tuple(torch.randn(B, H, dtype=torch.float64) for _ in ours.initial_state(B))
    output, after = ours(inputs, state)
    expected = theirs(inputs, state if len(state) > 1 else state[0])
    for mine, other in zip(after, expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    assert output is after[0]


@given(B=integers(1, 5), V=integers(2, 9), H=integers(1, 9))
def test_jordan_feeds_back_what_it_put_out_or_in_training_what_it_should_have(B: int, V: int, H: int) -> None:
    torch.manual_seed(B + 10 * V + 100 * H)
    cell = Jordan(V, H).double()
    ids, y = torch.randint(V, (B,)), torch.rand(B, V, dtype=torch.float64)
    one_hot = F.one_hot(ids, V).double()

    def equation(fed_back: Tensor) -> Tensor:
        h = torch.tanh(one_hot @ cell.weight_ih.T + fed_back @ cell.weight_hh.T + cell.bias_ih)
        return h @ cell.weight_ho.T + cell.bias_ho

    for mode, fed_back in ((True, one_hot), (False, y)):
        logits, (after,) = cell.train(mode)(ids, (y,))
        torch.testing.assert_close(logits, equation(fed_back), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(after, logits.softmax(-1))


def test_concatenation_and_addition_compute_the_same() -> None:
    added = Elman(4, 5, join="add")
    for parameter in added.parameters():
        nn.init.uniform_(parameter)
    joined = Elman(4, 5)
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh"):
            getattr(joined, name).copy_(getattr(added, name))
        assert added.bias_hh is not None
        joined.bias_ih.copy_(added.bias_ih + added.bias_hh)
    x, h = torch.randn(3, 4), torch.randn(3, 5)
    matrix = torch.cat([joined.weight_ih, joined.weight_hh], dim=1)  # over [x; h]
    concatenated = torch.tanh(torch.cat([x, h], dim=1) @ matrix.T + joined.bias_ih)
    torch.testing.assert_close(joined(x, (h,))[0], concatenated)
    torch.testing.assert_close(added(x, (h,))[0], concatenated)


@pytest.mark.parametrize("kind", CELLS.values())
def test_ids_stand_for_one_hot_vectors(kind: type[Cell]) -> None:
    cell = kind(6, 5)
    ids = torch.randint(6, (3,))
    expected = F.one_hot(ids, 6).float() @ cell.weight_ih.T + cell.bias_ih
    if isinstance(cell, Jordan):
        cell.eval()
    torch.testing.assert_close(cell.project(ids), expected)


@pytest.mark.parametrize("kind", CELLS.values())
def test_the_first_state_is_zero(kind: type[Cell]) -> None:
    for tensor in kind(3, 5).initial_state(2):
        assert tensor.shape == (2, 3 if kind is Jordan else 5)
        assert not tensor.any()


@pytest.mark.parametrize("kind", CELLS.values())
def test_weights_begin_within_the_scale_and_biases_at_zero(kind: type[Cell]) -> None:
    cell = kind(50, 60)
    cell.reset_parameters(0.05)
    for name, parameter in cell.named_parameters():
        if name.startswith("weight"):
            assert 0.049 < parameter.abs().max() <= 0.05
            assert abs(parameter.mean()) < 0.002
        else:
            assert not parameter.any()
    cell.reset_parameters(0.05, draw_biases=True)
    assert all(0.04 < parameter.abs().max() <= 0.05 for parameter in cell.parameters())


def test_the_forget_bias_is_on_the_forget_gate_alone() -> None:
    cell = LSTM(3, 4, forget_bias=1.5)
    cell.reset_parameters(0.1)
    assert cell.bias_ih.tolist() == [0.0] * 4 + [1.5] * 4 + [0.0] * 8
