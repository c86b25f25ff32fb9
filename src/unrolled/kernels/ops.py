"""The native kernels of training as PyTorch operators with their gradients: `torch.ops.unrolled.*`.

Each has a plain twin that computes the same: `unroll_plain`, `token_nll_plain`, `dropout_plain`. To call an operator
where they are not built is an error. The file is long because an operator, its shapes, its gradient and what it
refuses are read together.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from unrolled.kernels.build import library

KINDS = {"lstm": 0, "gru": 1, "tanh": 2, "relu": 3}
GATES = (4, 3, 1, 1)
FEW_WORDS = 256
"""Up to so many the decoder's threads share out tokens, not words; source/decoder.cpp has the same number."""
MOST_KEPT = 1 << 24
"""So many of a window's exponentials are kept in f32 for the backward pass, 64 MiB; more are made again."""
SLOTS = (4, 4, 1, 1)
"""Of each kind, how many numbers are computed for a unit in a step."""
_KEEPS_GATES = (True, True, False, False)
_NO_SUCH_ID, _NO_SUCH_STATE, _NO_SUCH_COUNT, _NO_SUCH_MODEL = 2, 3, 4, 5
operators = torch.library.Library("unrolled", "DEF")
Forward = TypeVar("Forward", bound=Callable[..., Any])


class Layer(NamedTuple):
    """A layer as the kernels take it: a kind of `KINDS`; weight_ih (GH, E), weight_hh (GH, H), bias (GH,)."""

    kind: str
    weights: tuple[Tensor, Tensor, Tensor]


def serves(parameter: Tensor) -> bool:
    """Whether the kernels are built and take this parameter: f32, on the CPU."""
    return parameter.device.type == "cpu" and parameter.dtype == torch.float32 and library() is not None


def call(name: str, *arguments: Any) -> None:
    """Calls a function of the kernels by name; raises what its answer says."""
    found = library()
    if found is None:
        raise RuntimeError("the kernels are not built; unrolled kernels build")
    values = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    failure = getattr(found, name)(*values)
    if failure == _NO_SUCH_ID:
        raise IndexError("an id is not below the number of tokens")
    if failure == _NO_SUCH_STATE:
        raise ValueError("the state is not that of so many streams of this model")
    if failure == _NO_SUCH_COUNT:
        raise ValueError("k must be at least 1 and at most the number of tokens")
    if failure == _NO_SUCH_MODEL:
        raise ValueError("that is no model from `pack`")
    if failure:
        raise MemoryError("not enough memory for a kernel's workspace")


def expect(*pairs: tuple[Tensor | None, tuple[int, ...]], ids: bool = False) -> None:
    """The kernels read memory as they are told it lies, so what a caller gets wrong is refused before."""
    wanted = (torch.int64, torch.int32) if ids else (torch.float32,)
    for tensor, shape in pairs:
        if tensor is not None and (tensor.shape != shape or tensor.dtype not in wanted or tensor.device.type != "cpu"):
            found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"a kernel expects {'ids' if ids else 'f32'} of shape {shape} on the CPU, not {found}")


def once(gradients: Callable[..., Any]) -> Callable[..., Any]:
    """Gradients that have none themselves, and say so to who asks for a graph of them (`create_graph`)."""

    def checked(ctx: Any, *arguments: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "this gradient cannot be differentiated again (create_graph); a plain loop over nn.cells can"
            )
        return gradients(ctx, *arguments)

    return checked


def _differentiable(
    forward: Forward, context: Callable[..., None], gradients: Callable[..., Any], backward: Callable[..., Any]
) -> Forward:
    """Gives an operator its gradient, `gradients` of what computes it, `backward`. Returns it as a function that goes
    round PyTorch's dispatcher, both ways, where a gradient may be asked for and nothing is compiled: that saves half of
    the time that it takes to call one. `_name` is the operator `name`."""
    name, backward_name = (way.__name__.removeprefix("_") for way in (forward, backward))
    operator = getattr(torch.ops.unrolled, name)
    traced = once(partial(gradients, getattr(torch.ops.unrolled, backward_name)))
    torch.library.register_autograd(f"unrolled::{name}", traced, setup_context=context, lib=operators)
    direct = once(partial(gradients, backward))

    class Direct(torch.autograd.Function):  # with PyTorch's `setup_context` a call would take twice the time
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = forward(*arguments)
            context(ctx, arguments, output)
            return output

        backward = staticmethod(direct)

    def called(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return Direct.apply(*arguments)
        return operator(*arguments)

    return cast("Forward", called)


def as_int64(ids: Tensor) -> Tensor:
    """`ids.long()`, and never a node of the graph where nothing changes, which an operator may not return."""
    return ids if ids.dtype == torch.int64 else ids.long()


# ------------------------------------------------------------------------------------------------ a recurrent layer


operators.define(
    "recurrent("
    "Tensor inputs, Tensor h, Tensor? c, Tensor weight_ih, Tensor weight_hh, Tensor bias, int kind, "
    "bool narrow"
    ") -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(operators, "recurrent", "CPU")
def _recurrent(
    inputs: Tensor,
    h: Tensor,
    c: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    kind: int,
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A layer over T steps. Gates stand as in torch.nn; `narrow` multiplies in bf16 and sums in f32, else all is f32.

    Args:
        inputs: (T, B, E), or ids (T, B) that stand for one-hot vectors.
        h: (B, H), the hidden layer before.
        c: (B, H), an LSTM's cells before; None for other kinds.
        weight_ih, weight_hh, bias: (GH, E), (GH, H), (GH,).
        kind: of `KINDS`.
        narrow: bf16 operands.

    Returns:
        outputs (T, B, H); the last cells (B, H), empty but for an LSTM; and for the backward pass the gates
        (T, B, U, S, 16), empty for an Elman layer, and cells (T, B, U, 16), units in U blocks of 16.
    """
    if (c is None) != (kind != KINDS["lstm"]):
        raise ValueError("an LSTM has cells, and nothing else has")
    (batch, size), gates_size = h.shape, GATES[kind] * h.shape[1]
    shape = (*inputs.shape[:2], weight_ih.shape[1])[: 3 if inputs.is_floating_point() else 2]
    expect((inputs, shape), ids=not inputs.is_floating_point())
    expect((h, (inputs.shape[1], size)), (c, (batch, size)), (bias, (gates_size,)))
    expect((weight_ih, (gates_size, weight_ih.shape[1])), (weight_hh, (gates_size, size)))
    outputs, c_last, gates, cells = _recurrent_shapes(inputs, h, c, weight_ih, weight_hh, bias, kind, narrow)
    (steps, batch), ids = inputs.shape[:2], not inputs.is_floating_point()
    inputs = as_int64(inputs) if ids else inputs
    inputs, h, weight_ih, weight_hh, bias = (t.contiguous() for t in (inputs, h, weight_ih, weight_hh, bias))
    call(
        "recurrent_forward", kind, narrow, torch.get_num_threads(), steps, batch, weight_ih.shape[1], h.shape[1],
        None if ids else inputs, inputs if ids else None, h, None if c is None else c.contiguous(), weight_ih,
        weight_hh, bias, outputs, c_last, gates, cells,
    )  # fmt: skip
    return outputs, c_last, gates, cells


@torch.library.register_fake("unrolled::recurrent", lib=operators)
def _recurrent_shapes(
    inputs: Tensor,
    h: Tensor,
    c: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    kind: int,
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (steps, batch), (_, hidden) = inputs.shape[:2], h.shape
    blocks = (hidden + 15) // 16
    outputs = h.new_empty(steps, batch, hidden)
    gates = h.new_empty(_shape_of_gates(kind, steps, batch, blocks))
    if c is None:
        return outputs, h.new_empty(0), gates, h.new_empty(0)
    return outputs, h.new_empty(batch, hidden), gates, h.new_empty(steps, batch, blocks, 16)


def _shape_of_gates(kind: int, steps: int, batch: int, blocks: int) -> tuple[int, ...]:
    return (steps, batch, blocks, SLOTS[kind], 16) if _KEEPS_GATES[kind] else (0,)


operators.define(
    "recurrent_backward("
    "Tensor d_outputs, Tensor? d_c_last, Tensor inputs, Tensor h, Tensor? c, Tensor weight_ih, "
    "Tensor weight_hh, Tensor outputs, Tensor gates, Tensor cells, int kind, bool narrow, "
    "bool wants_inputs"
    ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(operators, "recurrent_backward", "CPU")
def _recurrent_backward(
    d_outputs: Tensor, d_c_last: Tensor | None, inputs: Tensor, h: Tensor, c: Tensor | None, weight_ih: Tensor,
    weight_hh: Tensor, outputs: Tensor, gates: Tensor, cells: Tensor, kind: int, narrow: bool, wants_inputs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `recurrent`: of inputs (empty if not wanted), h, c (empty but for an LSTM), weights, bias."""
    gradients = _backward_shapes(
        d_outputs, d_c_last, inputs, h, c, weight_ih, weight_hh, outputs, gates, cells, kind, narrow, wants_inputs
    )
    (steps, batch), ids = inputs.shape[:2], not inputs.is_floating_point()
    if (c is None) != (kind != KINDS["lstm"]):
        raise ValueError("an LSTM has cells, and nothing else has")
    wide, (_, size) = weight_ih.shape[1], h.shape
    of_units = steps, batch, (size + 15) // 16
    expect((inputs, (steps, batch) if ids else (steps, batch, wide)), ids=ids)
    expect((d_outputs, (steps, batch, size)), (outputs, (steps, batch, size)), (h, (batch, size)), (c, (batch, size)))
    expect((weight_ih, (GATES[kind] * size, wide)), (weight_hh, (GATES[kind] * size, size)))
    expect((d_c_last, (batch, size)), (gates, _shape_of_gates(kind, *of_units)))
    expect((cells, (0,) if c is None else (*of_units, 16)))
    inputs = as_int64(inputs) if ids else inputs
    inputs, h, weight_ih, weight_hh = (t.contiguous() for t in (inputs, h, weight_ih, weight_hh))
    outputs, gates, cells = (t.contiguous() for t in (outputs, gates, cells))
    d_inputs, d_h, d_c, *rest = gradients
    call(
        "recurrent_backward", kind, narrow, torch.get_num_threads(), steps, batch, weight_ih.shape[1], h.shape[1],
        d_outputs.contiguous(), None if d_c_last is None else d_c_last.contiguous(), None if ids else inputs,
        inputs if ids else None, h, None if c is None else c.contiguous(), weight_ih, weight_hh, outputs, gates, cells,
        d_inputs if wants_inputs else None, d_h, d_c, *rest,
    )  # fmt: skip
    return gradients


@torch.library.register_fake("unrolled::recurrent_backward", lib=operators)
def _backward_shapes(
    d_outputs: Tensor, d_c_last: Tensor | None, inputs: Tensor, h: Tensor, c: Tensor | None, weight_ih: Tensor,
    weight_hh: Tensor, outputs: Tensor, gates: Tensor, cells: Tensor, kind: int, narrow: bool, wants_inputs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    none = h.new_empty(0)
    empty = torch.empty_like
    contiguous = torch.contiguous_format
    d_inputs = empty(inputs, memory_format=contiguous) if wants_inputs else none
    d_c = none.clone() if c is None else empty(c, memory_format=contiguous)
    return (
        d_inputs,
        empty(h, memory_format=contiguous),
        d_c,
        empty(weight_ih, memory_format=contiguous),
        empty(weight_hh, memory_format=contiguous),
        weight_ih.new_empty(weight_ih.shape[0]),
    )


def _recurrent_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, h, c, weight_ih, weight_hh, _, ctx.kind, ctx.narrow = inputs
    outputs, _, gates, cells = output
    x = x if x.is_floating_point() else as_int64(x)
    ctx.save_for_backward(x, h, c, weight_ih, weight_hh, outputs, gates, cells)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gates, cells)


def _recurrent_gradients(
    backward: Callable[..., Any], ctx: Any, d_outputs: Tensor | None, d_c_last: Tensor | None, *unused: Any
) -> tuple[Any, ...]:
    inputs, h, c, weight_ih, weight_hh, outputs, gates, cells = ctx.saved_tensors
    if d_outputs is None:
        d_outputs = torch.zeros_like(outputs)
    wants_inputs = ctx.needs_input_grad[0] and inputs.is_floating_point()
    d_inputs, d_h, d_c, *d_weights = backward(
        d_outputs, d_c_last if c is not None else None, inputs, h, c, weight_ih, weight_hh, outputs, gates, cells,
        ctx.kind, ctx.narrow, wants_inputs,
    )  # fmt: skip
    return d_inputs if wants_inputs else None, d_h, d_c if c is not None else None, *d_weights, None, None


recurrent = _differentiable(_recurrent, _recurrent_context, _recurrent_gradients, _recurrent_backward)


# ------------------------------------------------------------------------------------------------ decoder and loss


operators.define(
    "decoder_nll("
    "Tensor hidden, Tensor weight, Tensor bias, Tensor targets, bool narrow, bool keep"
    ") -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(operators, "decoder_nll", "CPU")
def _decoder_nll(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, narrow: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Negative log-likelihood of each target under softmax(hidden weight' + bias); the logits are never whole.

    Args:
        hidden: (N, H).
        weight, bias: (V, H), (V,).
        targets: (N,) ids.
        narrow: bf16 operands.
        keep: keep exponentials for a backward pass, which otherwise makes them again: in bf16, or with f32 operands up
            to `MOST_KEPT` in f32; not those of few words.

    Returns:
        nll (N,) in nats; and for the backward pass shift (N,), sums (N,), exponentials (V, N) padded, or empty.
    """
    (tokens, size), vocabulary = hidden.shape, len(weight)
    expect((hidden, (tokens, size)), (weight, (vocabulary, size)), (bias, (vocabulary,)))
    expect((targets, (tokens,)), ids=True)
    targets = as_int64(targets)
    result = nll, shift, sums, exponentials = _decoder_shapes(hidden, weight, bias, targets, narrow, keep)
    call(
        "decoder_forward", narrow, torch.get_num_threads(), tokens, size, vocabulary, hidden.contiguous(),
        weight.contiguous(), bias.contiguous(), targets.contiguous(), nll, shift, sums,
        exponentials if exponentials.numel() else None,
    )  # fmt: skip
    return result


@torch.library.register_fake("unrolled::decoder_nll", lib=operators)
def _decoder_shapes(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, narrow: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    nll, shift, sums = (hidden.new_empty(tokens) for _ in range(3))
    size = _shape_of_kept(tokens, vocabulary)
    kept = keep and vocabulary > FEW_WORDS and (narrow or vocabulary * size[1] <= MOST_KEPT)
    size = size if kept else (0,)
    return nll, shift, sums, hidden.new_empty(size, dtype=torch.bfloat16 if narrow else torch.float32)


def _shape_of_kept(tokens: int, vocabulary: int) -> tuple[int, int]:
    return vocabulary + 32, (tokens + 31) // 32 * 32


operators.define(
    "decoder_nll_backward("
    "Tensor gradient, Tensor hidden, Tensor weight, Tensor bias, Tensor targets, Tensor shift, "
    "Tensor sums, Tensor exponentials, bool narrow"
    ") -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(operators, "decoder_nll_backward", "CPU")
def _decoder_nll_backward(
    gradient: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, shift: Tensor, sums: Tensor,
    exponentials: Tensor, narrow: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `decoder_nll`: of hidden, weight, bias, given that of each target's nll (N,)."""
    gradients = _decoder_backward_shapes(gradient, hidden, weight, bias, targets, shift, sums, exponentials, narrow)
    (tokens, size), vocabulary = hidden.shape, weight.shape[0]
    expect((hidden, (tokens, size)), (weight, (vocabulary, size)), (bias, (vocabulary,)))
    expect((gradient, (tokens,)), (shift, (tokens,)), (sums, (tokens,)))
    expect((targets, (tokens,)), ids=True)
    if exponentials.numel():
        kind, shape = torch.bfloat16 if narrow else torch.float32, _shape_of_kept(tokens, vocabulary)
        if exponentials.dtype != kind or exponentials.shape != shape or not exponentials.is_contiguous():
            raise ValueError(f"the exponentials kept are not {kind} of shape {shape}")
    call(
        "decoder_backward", narrow, torch.get_num_threads(), tokens, size, vocabulary, gradient.contiguous(),
        hidden.contiguous(), weight.contiguous(), bias.contiguous(), as_int64(targets).contiguous(),
        shift.contiguous(), sums.contiguous(), exponentials if exponentials.numel() else None, *gradients,
    )  # fmt: skip
    return gradients


@torch.library.register_fake("unrolled::decoder_nll_backward", lib=operators)
def _decoder_backward_shapes(
    gradient: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, shift: Tensor, sums: Tensor,
    exponentials: Tensor, narrow: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_hidden, d_weight, d_bias = (tensor.new_empty(tensor.shape) for tensor in (hidden, weight, bias))
    return d_hidden, d_weight, d_bias


def _decoder_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, ctx.narrow, _ = inputs
    _, shift, sums, exponentials = output
    ctx.save_for_backward(hidden, weight, bias, as_int64(targets), shift, sums, exponentials)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(shift, sums, exponentials)


def _decoder_gradients(
    backward: Callable[..., Any], ctx: Any, gradient: Tensor | None, *unused: Any
) -> tuple[Any, ...]:
    if gradient is None:
        return None, None, None, None, None, None
    return *backward(gradient, *ctx.saved_tensors, ctx.narrow), None, None, None


decoder_nll = _differentiable(_decoder_nll, _decoder_context, _decoder_gradients, _decoder_nll_backward)


# ------------------------------------------------------------------------------------------------ dropout

operators.define("dropout(Tensor x, float p, int seed) -> Tensor")


@torch.library.impl(operators, "dropout", "CPU")
def _dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """x with each element zero with probability p, else divided by 1 - p; by a hash of seed and place."""
    expect((x, tuple(x.shape)))
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    call("dropout", torch.get_num_threads(), x.numel(), int(p * 2**32), 1 / (1 - p), seed, x, y)
    return y


@torch.library.register_fake("unrolled::dropout", lib=operators)
def _dropout_shape(x: Tensor, p: float, seed: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _dropout_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, ctx.seed = inputs


def _dropout_gradients(again: Callable[..., Tensor], ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return again(gradient, ctx.p, ctx.seed), None, None


dropout = _differentiable(_dropout, _dropout_context, _dropout_gradients, _dropout)
