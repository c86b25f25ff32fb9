r"""One step of a recurrent layer: `(inputs, state) -> (output, state)`.

A cell is an equation. Unrolling it over time lives in `unroll.py`, stacking in `model.py`. Parameter names, shapes and
gate order are those of `torch.nn`'s cell where there is one, so that parity with it is one `load_state_dict`, except
that a gate set has one bias vector here (`bias_ih`) unless it is asked to have `torch.nn`'s second one (`bias_hh`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar, Literal, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Join: TypeAlias = Literal["concatenate", "add"]
"""How input and feedback meet. "concatenate": one matrix over [x_t; h_{t-1}], which is [W_ih, W_hh], with one bias.
"add": the two are transformed apart, each with its own bias, and added. The two compute the same functions; only the
bias is learnt twice as fast when added."""

State: TypeAlias = tuple[Tensor, ...]
"""What a cell carries from one step to the next, each tensor (B, H), a Jordan cell's (B, V)."""

Activation: TypeAlias = Literal["tanh", "relu"]
_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu}


class Cell(nn.Module, ABC):
    """The contract: one step over B streams.

    `forward(inputs (B, E), state) -> (output (B, H), state)`. Output and state are separate, because a network may
    feed back something other than what it puts out. Inputs may also be ids (B,), which stand for one-hot vectors of
    length E: they pick columns of the first matrix, and no such vector is ever made.

    A step is in two parts, `step(project(inputs), state)`: the input's part does not wait for the state, so that of a
    whole window is one product. Every gate set is one product over the input and one over what is fed back, so all
    cells share these parameters:

    Shapes: weight_ih (G*H, E), weight_hh (G*H, F), bias_ih (G*H,) for G gates and F fed-back units: H, or V.
    """

    gates: int
    """G, how many vectors of length H one step computes."""
    options: ClassVar[tuple[str, ...]] = ()
    """The names of what else the cell is made with."""
    decodes = False
    """Whether the output is logits (B, V) already, so that no decoder belongs on top."""

    def __init__(self, input_size: int, hidden_size: int, feedback_size: int | None = None) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.weight_ih = nn.Parameter(torch.empty(self.gates * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(self.gates * hidden_size, feedback_size or hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(self.gates * hidden_size))
        self.reset_parameters(hidden_size**-0.5)

    def reset_parameters(self, init_scale: float, draw_biases: bool = False) -> None:
        """Weights uniform in [-init_scale, init_scale], biases zero, or drawn like the weights."""
        for parameter in self.parameters():
            if parameter.dim() > 1 or draw_biases:
                nn.init.uniform_(parameter, -init_scale, init_scale)
            else:
                nn.init.zeros_(parameter)

    def initial_state(self, batch_size: int) -> State:
        """The zero state of `batch_size` streams, on the parameters' device."""
        return (self.weight_hh.new_zeros(batch_size, self.weight_hh.shape[1]),)

    def project(self, inputs: Tensor) -> Tensor:
        """The input's part of any number of steps: inputs (…, E), or ids (…), -> (…, G*H)."""
        if inputs.is_floating_point():
            return F.linear(inputs, self.weight_ih, self.bias_ih)
        return F.embedding(inputs, self.weight_ih.T) + self.bias_ih

    @abstractmethod
    def step(self, projected: Tensor, state: State) -> tuple[Tensor, State]:
        """The rest of a step. projected (B, G*H), state as from `initial_state` -> output (B, H), next state."""

    def forward(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """One step. inputs (B, E) or ids (B,), state as from `initial_state` -> output (B, H), next state."""
        return self.step(self.project(inputs), state)

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
    `join` is "add" in Zaremba's own program and in `torch.nn.LSTM`, "concatenate" in TensorFlow's tutorial.

    Shapes: inputs (B, E), state (h (B, H), c (B, H)), output h (B, H); with "add" also bias_hh (4*H,). Gate order
    i, f, g, o.
    """

    gates = 4
    options = ("forget_bias", "join")

    def __init__(self, input_size: int, hidden_size: int, forget_bias: float = 0.0, join: Join = "concatenate") -> None:
        self.forget_bias = forget_bias
        super().__init__(input_size, hidden_size)
        self.bias_hh = nn.Parameter(torch.zeros(4 * hidden_size)) if join == "add" else None

    def reset_parameters(self, init_scale: float, draw_biases: bool = False) -> None:
        super().reset_parameters(init_scale, draw_biases)
        with torch.no_grad():
            self.bias_ih[self.hidden_size : 2 * self.hidden_size] += self.forget_bias

    def initial_state(self, batch_size: int) -> State:
        return super().initial_state(batch_size) + super().initial_state(batch_size)

    def step(self, projected: Tensor, state: State) -> tuple[Tensor, State]:
        h, c = state
        i, f, g, o = (projected + F.linear(h, self.weight_hh, self.bias_hh)).chunk(4, dim=-1)
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

    def step(self, projected: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        from_input = projected.chunk(3, dim=-1)
        from_hidden = (h @ self.weight_hh.T).chunk(3, dim=-1)
        r = (from_input[0] + from_hidden[0]).sigmoid()
        z = (from_input[1] + from_hidden[1]).sigmoid()
        n = (from_input[2] + r * from_hidden[2]).tanh()
        h = (1 - z) * n + z * h
        return h, (h,)


@final
class Elman(Cell):
    r"""The simple recurrent network: the hidden layer is fed back.

    .. math:: h_t = \phi(W_{ih} x_t + W_{hh} h_{t-1} + b)

    Elman 1990, "Finding structure in time", fig. 2. Departs from it: :math:`\phi` is tanh or ReLU, not the logistic
    function, and gradients reach back through the window, not one step.

    `join` is "add" in `torch.nn.RNNCell`.

    Shapes: inputs (B, E), state (h (B, H),), output h (B, H); with "add" also bias_hh (H,).
    """

    gates = 1
    options = ("activation", "join")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        activation: Activation = "tanh",
        join: Join = "concatenate",
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.activation = _ACTIVATIONS[activation]
        self.bias_hh = nn.Parameter(torch.zeros(hidden_size)) if join == "add" else None

    def step(self, projected: Tensor, state: State) -> tuple[Tensor, State]:
        (h,) = state
        h = self.activation(projected + F.linear(h, self.weight_hh, self.bias_hh))
        return h, (h,)


@final
class Jordan(Cell):
    r"""The output is fed back: a distribution over the V tokens, which the cell therefore computes itself.

    .. math::
        h_t &= \phi(W_{ih} x_t + W_{hh} y_{t-1} + b) \\
        y_t &= \mathrm{softmax}(W_{ho} h_t + b_{ho})

    Jordan 1986, "Serial order: a parallel distributed processing approach". Departs from it: the output is a
    distribution, and it is fed back without a decaying trace of earlier outputs.

    With teacher forcing the true previous output stands in the place of :math:`y_{t-1}`. That *is* the current input:
    what should have come out at t - 1 is the token that goes in at t. So nothing older than :math:`x_t` has a say, and
    the network is a first-order Markov chain, no better than the bigrams of its text. `teacher_forcing` is on in
    training mode and off in evaluation mode, where the network goes by what it put out itself; `teacher_forced` says
    otherwise, to whoever asks it and to no other thread.

    Shapes: inputs ids (B,), state (y (B, V),), output logits (B, V); weight_ho (V, H), bias_ho (V,).
    """

    gates = 1
    options = ("activation",)
    decodes = True

    def __init__(self, input_size: int, hidden_size: int, activation: Activation = "tanh") -> None:
        super().__init__(input_size, hidden_size, feedback_size=input_size)
        self.activation = _ACTIVATIONS[activation]
        self.weight_ho = nn.Parameter(torch.empty(input_size, hidden_size))
        self.bias_ho = nn.Parameter(torch.empty(input_size))
        self.reset_parameters(hidden_size**-0.5)

    @property
    def teacher_forcing(self) -> bool:
        """Whether the true previous output is fed back."""
        forced = _forced.get()
        return self.training if forced is None else forced

    def project(self, inputs: Tensor) -> Tensor:
        projected = super().project(inputs)
        return projected + F.embedding(inputs, self.weight_hh.T) if self.teacher_forcing else projected

    def step(self, projected: Tensor, state: State) -> tuple[Tensor, State]:
        (y,) = state
        h = self.activation(projected if self.teacher_forcing else projected + y @ self.weight_hh.T)
        logits = F.linear(h, self.weight_ho, self.bias_ho)
        return logits, (logits.softmax(-1),)


_forced: ContextVar[bool | None] = ContextVar("forced", default=None)


@contextmanager
def teacher_forced(forced: bool) -> Iterator[None]:
    """Within it, a Jordan network is fed the true previous token, or its own output; other cells take no notice."""
    token = _forced.set(forced)
    try:
        yield
    finally:
        _forced.reset(token)


CELLS: dict[str, type[Cell]] = {"lstm": LSTM, "gru": GRU, "elman": Elman, "jordan": Jordan}
"""Cells by the name that a recipe calls them."""
