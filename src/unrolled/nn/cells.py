r"""One step of a recurrent layer: `(inputs, state) -> (output, state)`.

A cell is an equation. Unrolling it over time lives in `unroll.py`, stacking in `model.py`. Parameter names, shapes and
gate order are those of `torch.nn`'s cell where there is one, so that parity with it is one `load_state_dict`, except
that a gate set has one bias vector here (`bias_ih`), as in the references; `torch.nn`'s second (`bias_hh`) is zero.
"""

from abc import ABC, abstractmethod
from typing import TypeAlias, final

import torch
from torch import Tensor, nn

State: TypeAlias = tuple[Tensor, ...]
"""What a cell carries from one step to the next, each tensor (B, H)."""


class Cell(nn.Module, ABC):
    """The contract: one step over B streams.

    `forward(inputs (B, E), state) -> (output (B, H), state)`. Output and state are separate, because a network may
    feed back something other than what it puts out. Every gate set is one product over the input and one over the
    previous hidden layer, so all cells share these parameters:

    Shapes: weight_ih (G*H, E), weight_hh (G*H, H), bias_ih (G*H,) for G gates.
    """

    gates: int
    """G, how many vectors of length H one step computes."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.weight_ih = nn.Parameter(torch.empty(self.gates * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(self.gates * hidden_size, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(self.gates * hidden_size))
        self.reset_parameters(hidden_size**-0.5)

    def reset_parameters(self, init_scale: float) -> None:
        """Weights uniform in [-init_scale, init_scale], biases zero."""
        nn.init.uniform_(self.weight_ih, -init_scale, init_scale)
        nn.init.uniform_(self.weight_hh, -init_scale, init_scale)
        nn.init.zeros_(self.bias_ih)

    @abstractmethod
    def initial_state(self, batch_size: int) -> State:
        """The zero state of `batch_size` streams, on the parameters' device."""

    @abstractmethod
    def forward(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """One step. inputs (B, E), state as from `initial_state` -> output (B, H), next state."""

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}"


@final
class LSTM(Cell):
    r"""Long short-term memory, without peepholes.

    .. math::
        i, f, g, o &= W_{ih} x_t + W_{hh} h_{t-1} + b \\
        c_t &= \sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh(g) \\
        h_t &= \sigma(o) \odot \tanh(c_t)

    Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000; Zaremba et al. 2014 (arXiv 1409.2329),
    eq. 1-2. `forget_bias` is added to the forget gate's bias when the parameters are set; the references use none.

    Shapes: inputs (B, E), state (h (B, H), c (B, H)), output h (B, H). Gate order i, f, g, o.
    """

    gates = 4

    def __init__(self, input_size: int, hidden_size: int, forget_bias: float = 0.0) -> None:
        self.forget_bias = forget_bias
        super().__init__(input_size, hidden_size)

    def reset_parameters(self, init_scale: float) -> None:
        super().reset_parameters(init_scale)
        with torch.no_grad():
            self.bias_ih[self.hidden_size : 2 * self.hidden_size] += self.forget_bias

    def initial_state(self, batch_size: int) -> State:
        zeros = self.weight_hh.new_zeros(batch_size, self.hidden_size)
        return zeros, zeros.clone()

    def forward(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        h, c = state
        i, f, g, o = (inputs @ self.weight_ih.T + h @ self.weight_hh.T + self.bias_ih).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return h, (h, c)


@final
class GRU(Cell):
    r"""Gated recurrent unit, with the reset gate after the product, as `torch.nn.GRUCell` and cuDNN have it.

    .. math::
        r &= \sigma(W_{ir} x_t + b_r + W_{hr} h_{t-1}) \\
        z &= \sigma(W_{iz} x_t + b_z + W_{hz} h_{t-1}) \\
        n &= \tanh(W_{in} x_t + b_n + r \odot (W_{hn} h_{t-1})) \\
        h_t &= (1 - z) \odot n + z \odot h_{t-1}

    Cho et al. 2014 (arXiv 1406.1078), eq. 5-8, departs from it in the place of r (there: W (r * h)).

    Shapes: inputs (B, E), state (h (B, H),), output h (B, H). Gate order r, z, n.
    """

    gates = 3

    def initial_state(self, batch_size: int) -> State:
        return (self.weight_hh.new_zeros(batch_size, self.hidden_size),)

    def forward(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        from_input = (inputs @ self.weight_ih.T + self.bias_ih).chunk(3, dim=-1)
        from_hidden = (h @ self.weight_hh.T).chunk(3, dim=-1)
        r = (from_input[0] + from_hidden[0]).sigmoid()
        z = (from_input[1] + from_hidden[1]).sigmoid()
        n = (from_input[2] + r * from_hidden[2]).tanh()
        h = (1 - z) * n + z * h
        return h, (h,)


CELLS: dict[str, type[Cell]] = {"lstm": LSTM, "gru": GRU}
"""Cells by the name that a recipe calls them."""
