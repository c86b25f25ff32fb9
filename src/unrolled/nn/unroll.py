"""A cell over the T steps of a window, by a plain loop or by faster ways; all learn the same.

The plain loop is the definition; the others are its twins with the same signature. Under CPU autocast to bf16 the
faster ways multiply bf16 operands and sum in f32.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from unrolled.kernels import ops
from unrolled.nn import rounding
from unrolled.nn.cells import GRU, LSTM, Cell, Elman, State

_FEW_KINDS = 1024

LayerStates: TypeAlias = tuple[State, ...]
"""The state of a stack: one cell's state for each of L layers."""

Unroll: TypeAlias = Callable[[Cell, Tensor, State], tuple[Tensor, State]]


def detach(states: LayerStates) -> LayerStates:
    """The same values without their history: gradients reach back to the window's first step and no further."""
    return tuple(tuple(tensor.detach() for tensor in state) for state in states)


def pick(states: LayerStates, rows: Sequence[int] | slice | Tensor) -> LayerStates:
    """The states of these streams, in this order."""
    return tuple(tuple(tensor[rows] for tensor in state) for state in states)


def join(several: Sequence[LayerStates]) -> LayerStates:
    """The states of all streams, one after the other."""
    return tuple(tuple(map(torch.cat, zip(*layer, strict=True))) for layer in zip(*several, strict=True))


def unroll_plain(cell: Cell, inputs: Tensor, state: State) -> tuple[Tensor, State]:
    """The oracle. inputs (T, B, E) or ids (T, B), state of the step before -> outputs (T, B, H), the last state."""
    outputs = []
    for x_t in inputs:
        output, state = cell(x_t, state)
        outputs.append(output)
    return torch.stack(outputs), state


def unroll_projected(cell: Cell, inputs: Tensor, state: State) -> tuple[Tensor, State]:
    """The same with the input's part of all steps as one product, or one look-up of ids."""
    outputs = []
    for projected in cell.project(inputs):
        output, state = cell.step(projected, state)
        outputs.append(output)
    return torch.stack(outputs), state


def unroll_fused(cell: Cell, inputs: Tensor, state: State) -> tuple[Tensor, State]:
    """The same through what is behind `torch.nn.LSTM`, `GRU` and `RNN`: oneDNN or ATen on the CPU, cuDNN on a GPU.

    Raises:
        TypeError: PyTorch has no fused layer for this cell, or not over ids.
        ValueError: the state is that of other streams.
    """
    if not inputs.is_floating_point():
        raise TypeError("PyTorch's fused layers take vectors, not ids")
    bias_hh = getattr(cell, "bias_hh", None)  # PyTorch's layers want a second bias; most of ours have one
    bias_hh = torch.zeros_like(cell.bias_ih) if bias_hh is None else bias_hh
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, bias_hh]
    options = (True, 1, 0.0, cell.training, False, False)  # biases, layers, dropout, train, bidirectional, batch first
    kind = inputs.device.type
    by_hand = rounding.is_asked(kind) and (kind != "cpu" or not rounding.is_native())
    if by_hand and kind == "cpu":
        inputs, weights[:2] = rounding.rounded(inputs), map(rounding.rounded, weights[:2])
    elif kind != "cpu":
        dtype = torch.bfloat16 if by_hand else cell.weight_ih.dtype  # where autocast would have cuDNN take f16
        inputs, state = inputs.to(dtype), tuple(part.to(dtype) for part in state)
        weights = _in_one_piece([weight.to(dtype) for weight in weights])
    with torch.autocast(kind, enabled=False) if by_hand else nullcontext():
        if isinstance(cell, LSTM):
            if any(part.shape != (inputs.shape[1], cell.hidden_size) for part in state):  # it would be read beyond
                raise ValueError(f"the state is not that of {inputs.shape[1]} streams of {cell.hidden_size} units")
            outputs, h, c = torch.lstm(inputs, [tensor.unsqueeze(0) for tensor in state], weights, *options)
            return outputs, (h.squeeze(0), c.squeeze(0))
        if isinstance(cell, GRU):
            outputs, h = torch.gru(inputs, state[0].unsqueeze(0), weights, *options)
            return outputs, (h.squeeze(0),)
        if isinstance(cell, Elman):
            layer = torch.rnn_relu if cell.activation is torch.relu else torch.rnn_tanh
            outputs, h = layer(inputs, state[0].unsqueeze(0), weights, *options)
            return outputs, (h.squeeze(0),)
    raise TypeError(f"PyTorch has no fused layer for {type(cell).__name__}")


def _in_one_piece(weights: list[Tensor]) -> list[Tensor]:
    """The same values one after the other in memory, as cuDNN wants them; else PyTorch warns."""
    flat = torch.cat([weight.flatten() for weight in weights])
    parts = flat.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


def unroll_native(cell: Cell, inputs: Tensor, state: State) -> tuple[Tensor, State]:
    """The same through the kernels that `unrolled kernels build` compiles, on the CPU.

    Raises:
        TypeError: there is no kernel for this cell.
        RuntimeError: they are not built.
    """
    layer = kernel_layer(cell)
    if layer is None:
        raise TypeError(f"there is no kernel for {type(cell).__name__}")
    c = state[1] if isinstance(cell, LSTM) else None
    inputs = inputs.float() if inputs.is_floating_point() else inputs  # autocast may have narrowed them
    outputs, c_last, *_ = ops.recurrent(
        inputs, state[0], c, *layer.weights, ops.KINDS[layer.kind], rounding.is_asked("cpu")
    )
    return outputs, (outputs[-1],) if c is None else (outputs[-1], c_last)


def kernel_layer(cell: Cell) -> ops.Layer | None:
    """What the kernels take of a cell, or None where they have none for it."""
    if not isinstance(cell, LSTM | GRU | Elman):
        return None
    kind, bias_hh = "lstm" if isinstance(cell, LSTM) else "gru", getattr(cell, "bias_hh", None)
    if isinstance(cell, Elman):
        kind = "relu" if cell.activation is torch.relu else "tanh"
    bias = cell.bias_ih if bias_hh is None else cell.bias_ih + bias_hh
    return ops.Layer(kind, (cell.weight_ih, cell.weight_hh, bias))


def unroll(cell: Cell, inputs: Tensor, state: State) -> tuple[Tensor, State]:
    """The fastest way there is for this cell. inputs (T, B, E) or ids (T, B) -> outputs (T, B, H), the last state."""
    known = isinstance(cell, LSTM | GRU | Elman)
    if known and ops.serves(cell.weight_hh):
        return unroll_native(cell, inputs, state)
    if known and inputs.device.type != "cpu" and not inputs.is_floating_point() and cell.input_size <= _FEW_KINDS:
        inputs = F.one_hot(inputs, cell.input_size).to(cell.weight_ih.dtype)  # for cuDNN; the loop waits for each step
    fused = known and inputs.is_floating_point() and len(inputs) > 1  # for one step oneDNN takes twice the time
    outputs, after = (unroll_fused if fused else unroll_projected)(cell, inputs, state)
    return outputs, tuple(part.to(was.dtype) for part, was in zip(after, state, strict=True))  # what is carried is f32
