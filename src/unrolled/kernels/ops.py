"""The native kernels as PyTorch operators with their gradients: `torch.ops.unrolled.*`.

Each has a plain twin that computes the same: `unroll_plain`, `token_nll_plain`, `dropout_plain`, `clip_by_global_norm`
with plain SGD, `Stream` over the model itself. To call an operator where they are not built is an error.
"""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unrolled.kernels.build import library

KINDS = {"lstm": 0, "gru": 1, "tanh": 2, "relu": 3}
_SLOTS = (4, 4, 1, 1)
_GATES = (4, 3, 1, 1)
_NO_SUCH_ID, _NO_SUCH_STATE, _NO_SUCH_COUNT = 2, 3, 4
_library = torch.library.Library("unrolled", "DEF")


def serves(parameter: Tensor) -> bool:
    """Whether the kernels are built and take this parameter: f32, on the CPU."""
    return parameter.device.type == "cpu" and parameter.dtype == torch.float32 and library() is not None


def _call(name: str, *arguments: Any) -> None:
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
    if failure:
        raise MemoryError("not enough memory for a kernel's workspace")


def _expect(*pairs: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """The kernels read memory as they are told it lies, so what a caller gets wrong is refused before."""
    for tensor, shape in pairs:
        if tensor is not None and (
            tensor.shape != shape or tensor.dtype not in (torch.float32, torch.int64, torch.int32)
        ):
            raise ValueError(f"a kernel expects f32 or ids of shape {shape}, not {tensor.dtype} {tuple(tensor.shape)}")


# ------------------------------------------------------------------------------------------------ a recurrent layer


_library.define(
    "recurrent("
    "Tensor inputs, Tensor h, Tensor? c, Tensor weight_ih, Tensor weight_hh, Tensor bias, int kind, "
    "bool narrow"
    ") -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(_library, "recurrent", "CPU")
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
        (T, B, U, S, 16) and cells (T, B, U, 16), units in U blocks of 16.
    """
    inputs = inputs if inputs.is_floating_point() else inputs.long()
    (batch, size), gates_size = h.shape, _GATES[kind] * h.shape[1]
    shape = (*inputs.shape[:2], weight_ih.shape[1])[: 3 if inputs.is_floating_point() else 2]
    _expect((inputs, shape), (h, (inputs.shape[1], size)), (c, (batch, size)), (bias, (gates_size,)))
    _expect((weight_ih, (gates_size, weight_ih.shape[1])), (weight_hh, (gates_size, size)))
    outputs, c_last, gates, cells = _recurrent_shapes(inputs, h, c, weight_ih, weight_hh, bias, kind, narrow)
    (steps, batch), ids = inputs.shape[:2], not inputs.is_floating_point()
    inputs, h, weight_ih, weight_hh, bias = (t.contiguous() for t in (inputs, h, weight_ih, weight_hh, bias))
    _call(
        "recurrent_forward", kind, narrow, torch.get_num_threads(), steps, batch, weight_ih.shape[1], h.shape[1],
        None if ids else inputs, inputs if ids else None, h, None if c is None else c.contiguous(), weight_ih,
        weight_hh, bias, outputs, c_last, gates, cells,
    )  # fmt: skip
    return outputs, c_last, gates, cells


@torch.library.register_fake("unrolled::recurrent", lib=_library)
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
    gates = h.new_empty(steps, batch, blocks, _SLOTS[kind], 16)
    if c is None:
        return outputs, h.new_empty(0), gates, h.new_empty(0)
    return outputs, h.new_empty(batch, hidden), gates, h.new_empty(steps, batch, blocks, 16)


_library.define(
    "recurrent_backward("
    "Tensor d_outputs, Tensor? d_c_last, Tensor inputs, Tensor h, Tensor? c, Tensor weight_ih, "
    "Tensor weight_hh, Tensor outputs, Tensor gates, Tensor cells, int kind, bool narrow, "
    "bool wants_inputs"
    ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(_library, "recurrent_backward", "CPU")
def _recurrent_backward(
    d_outputs: Tensor, d_c_last: Tensor | None, inputs: Tensor, h: Tensor, c: Tensor | None, weight_ih: Tensor,
    weight_hh: Tensor, outputs: Tensor, gates: Tensor, cells: Tensor, kind: int, narrow: bool, wants_inputs: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `recurrent`: of inputs (empty if not wanted), h, c (empty but for an LSTM), weights, bias."""
    gradients = _backward_shapes(
        d_outputs, d_c_last, inputs, h, c, weight_ih, weight_hh, outputs, gates, cells, kind, narrow, wants_inputs
    )
    (steps, batch), ids = inputs.shape[:2], not inputs.is_floating_point()
    inputs, h, weight_ih, weight_hh = (t.contiguous() for t in (inputs, h, weight_ih, weight_hh))
    d_inputs, d_h, d_c, *rest = gradients
    _call(
        "recurrent_backward", kind, narrow, torch.get_num_threads(), steps, batch, weight_ih.shape[1], h.shape[1],
        d_outputs.contiguous(), None if d_c_last is None else d_c_last.contiguous(), None if ids else inputs,
        inputs if ids else None, h, None if c is None else c.contiguous(), weight_ih, weight_hh, outputs, gates, cells,
        d_inputs if wants_inputs else None, d_h, d_c, *rest,
    )  # fmt: skip
    return gradients


@torch.library.register_fake("unrolled::recurrent_backward", lib=_library)
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
    ctx.save_for_backward(x, h, c, weight_ih, weight_hh, outputs, gates, cells)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gates, cells)


def _recurrent_gradients(ctx: Any, d_outputs: Tensor | None, d_c_last: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    inputs, h, c, weight_ih, weight_hh, outputs, gates, cells = ctx.saved_tensors
    if d_outputs is None:
        d_outputs = torch.zeros_like(outputs)
    wants_inputs = ctx.needs_input_grad[0] and inputs.is_floating_point()
    d_inputs, d_h, d_c, *d_weights = torch.ops.unrolled.recurrent_backward(
        d_outputs, d_c_last if c is not None else None, inputs, h, c, weight_ih, weight_hh, outputs, gates, cells,
        ctx.kind, ctx.narrow, wants_inputs,
    )  # fmt: skip
    return d_inputs if wants_inputs else None, d_h, d_c if c is not None else None, *d_weights, None, None


torch.library.register_autograd(
    "unrolled::recurrent", _recurrent_gradients, setup_context=_recurrent_context, lib=_library
)


# ------------------------------------------------------------------------------------------------ decoder and loss


_library.define(
    "decoder_nll("
    "Tensor hidden, Tensor weight, Tensor bias, Tensor targets, bool narrow, bool keep"
    ") -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(_library, "decoder_nll", "CPU")
def _decoder_nll(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, narrow: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Negative log-likelihood of each target under softmax(hidden weight' + bias); the logits are never whole.

    Args:
        hidden: (N, H).
        weight, bias: (V, H), (V,).
        targets: (N,) ids.
        narrow: bf16 operands.
        keep: keep exponentials in bf16 for a backward pass, which otherwise makes them again.

    Returns:
        nll (N,) in nats; and for the backward pass shift (N,), sums (N,), exponentials (V, N) padded, or empty.
    """
    (tokens, size), vocabulary, targets = hidden.shape, len(weight), targets.long()
    _expect((hidden, (tokens, size)), (weight, (vocabulary, size)), (bias, (vocabulary,)), (targets, (tokens,)))
    result = nll, shift, sums, exponentials = _decoder_shapes(hidden, weight, bias, targets, narrow, keep)
    _call(
        "decoder_forward", narrow, torch.get_num_threads(), tokens, size, vocabulary, hidden.contiguous(),
        weight.contiguous(), bias.contiguous(), targets.contiguous(), nll, shift, sums,
        exponentials if narrow and keep else None,
    )  # fmt: skip
    return result


@torch.library.register_fake("unrolled::decoder_nll", lib=_library)
def _decoder_shapes(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, narrow: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    nll, shift, sums = (hidden.new_empty(tokens) for _ in range(3))
    size = (vocabulary + 32, (tokens + 31) // 32 * 32) if narrow and keep else (0,)
    return nll, shift, sums, hidden.new_empty(size, dtype=torch.bfloat16)


_library.define(
    "decoder_nll_backward("
    "Tensor gradient, Tensor hidden, Tensor weight, Tensor bias, Tensor targets, Tensor shift, "
    "Tensor sums, Tensor exponentials, bool narrow"
    ") -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_library, "decoder_nll_backward", "CPU")
def _decoder_nll_backward(
    gradient: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, shift: Tensor, sums: Tensor,
    exponentials: Tensor, narrow: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `decoder_nll`: of hidden, weight, bias, given that of each target's nll (N,)."""
    gradients = _decoder_backward_shapes(gradient, hidden, weight, bias, targets, shift, sums, exponentials, narrow)
    (tokens, size), vocabulary = hidden.shape, weight.shape[0]
    _call(
        "decoder_backward", narrow, torch.get_num_threads(), tokens, size, vocabulary, gradient.contiguous(),
        hidden.contiguous(), weight.contiguous(), bias.contiguous(), targets.contiguous(), shift, sums,
        exponentials if exponentials.numel() else None, *gradients,
    )  # fmt: skip
    return gradients


@torch.library.register_fake("unrolled::decoder_nll_backward", lib=_library)
def _decoder_backward_shapes(
    gradient: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, shift: Tensor, sums: Tensor,
    exponentials: Tensor, narrow: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_hidden, d_weight, d_bias = (tensor.new_empty(tensor.shape) for tensor in (hidden, weight, bias))
    return d_hidden, d_weight, d_bias


def _decoder_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, ctx.narrow, _ = inputs
    _, shift, sums, exponentials = output
    ctx.save_for_backward(hidden, weight, bias, targets, shift, sums, exponentials)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(shift, sums, exponentials)


def _decoder_gradients(ctx: Any, gradient: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    if gradient is None:
        return None, None, None, None, None, None
    return *torch.ops.unrolled.decoder_nll_backward(gradient, *ctx.saved_tensors, ctx.narrow), None, None, None


torch.library.register_autograd(
    "unrolled::decoder_nll", _decoder_gradients, setup_context=_decoder_context, lib=_library
)


# ------------------------------------------------------------------------------------------------ the update


def _pointers(tensors: list[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _sizes(tensors: list[Tensor]) -> Any:
    return (ctypes.c_int64 * len(tensors))(*(tensor.numel() for tensor in tensors))


_library.define(
    "clip_and_descend("
    "Tensor(a!)[] parameters, Tensor[] gradients, Tensor[] others, float max_norm, float rate"
    ") -> Tensor"
)


@torch.library.impl(_library, "clip_and_descend", "CPU")
def _clip_and_descend(
    parameters: list[Tensor], gradients: list[Tensor], others: list[Tensor], max_norm: float, rate: float
) -> Tensor:
    """A clipped step of SGD: parameters -= rate * min(1, max_norm / norm) * gradients, where the norm is finite.

    Args:
        parameters: contiguous, changed in place.
        gradients: of these, in their shapes.
        others: gradients that count in the norm only.
        max_norm: above it the gradients are scaled down to it.
        rate: the learning rate.

    Returns:
        The global norm before clipping, an f64 scalar. Stretches are summed in f32, their sums in f64.
    """
    for parameter, gradient in zip(parameters, gradients, strict=True):
        _expect((gradient, tuple(parameter.shape)))
    dense, norm = [gradient.contiguous() for gradient in (*gradients, *others)], torch.empty((), dtype=torch.float64)
    _call(
        "clip_and_descend", torch.get_num_threads(), len(parameters), len(others), _pointers(parameters),
        _pointers(dense), _sizes(dense), max_norm, rate, norm,
    )  # fmt: skip
    return norm


@torch.library.register_fake("unrolled::clip_and_descend", lib=_library)
def _norm_shape(
    parameters: list[Tensor], gradients: list[Tensor], others: list[Tensor], max_norm: float, rate: float
) -> Tensor:
    return torch.empty((), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ dropout

_library.define("dropout(Tensor x, float p, int seed) -> Tensor")


@torch.library.impl(_library, "dropout", "CPU")
def _dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """x with each element zero with probability p, else divided by 1 - p; by a hash of seed and place."""
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    _call("dropout", torch.get_num_threads(), x.numel(), int(p * 2**32), 1 / (1 - p), seed, x, y)
    return y


@torch.library.register_fake("unrolled::dropout", lib=_library)
def _dropout_shape(x: Tensor, p: float, seed: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _dropout_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, ctx.seed = inputs


def _dropout_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.unrolled.dropout(gradient, ctx.p, ctx.seed), None, None


torch.library.register_autograd("unrolled::dropout", _dropout_gradient, setup_context=_dropout_context, lib=_library)


# ------------------------------------------------------------------------------------------------ one step of a model

_HEADER, _LAYER = 6, 7
_MOST_LAYERS = 64


class Layer(NamedTuple):
    """A layer as the kernels take it: a kind of `KINDS`; weight_ih (GH, E), weight_hh (GH, H), bias (GH,)."""

    kind: str
    weights: tuple[Tensor, Tensor, Tensor]


def pack(layers: list[Layer], embedding: Tensor | None, weight: Tensor, bias: Tensor, narrow: bool) -> Tensor:
    """A model's weights laid out for `step`, as bytes; embedding (V, E) where the first layer reads vectors."""
    itemsize, parts, size = 2 if narrow else 4, [], 8 * (_HEADER + _LAYER * _MOST_LAYERS)

    def place(count: int, bytes_each: int) -> int:
        nonlocal size
        at, size = size, size + (count * bytes_each + 63) // 64 * 64
        return at

    vocabulary, top = weight.shape
    header = [narrow, len(layers), vocabulary]
    header += [place(embedding.numel() if embedding is not None else 0, 4)]
    header += [place((vocabulary + 15) // 16 * 16 * ((top + 31) // 32 * 32), itemsize), place(vocabulary, 4)]
    for number, layer in enumerate(layers):
        inputs, hidden = layer.weights[0].shape[1], layer.weights[1].shape[1]
        kind, slots, one_hot = KINDS[layer.kind], _SLOTS[KINDS[layer.kind]], number == 0 and embedding is None
        width, panels = (hidden + 15) // 16 * 16 * slots, ctypes.c_int64()
        _call("layer_size", kind, narrow, one_hot, inputs, hidden, ctypes.addressof(panels))
        places = place(panels.value, itemsize), place(width, 4), place(inputs * width if one_hot else 0, 4)
        header += [kind, one_hot, inputs, hidden, *places]
        parts.append((kind, one_hot, inputs, hidden, layer.weights, places))
    packed = torch.zeros(size, dtype=torch.uint8)
    begin = packed.data_ptr()
    packed[: 8 * len(header)].view(torch.int64).copy_(torch.tensor(header, dtype=torch.int64))
    _, _, _, at_embedding, at_decoder, at_bias = header[:_HEADER]
    if embedding is not None:
        packed[at_embedding:][: 4 * embedding.numel()].view(torch.float32).copy_(embedding.flatten())
    packed[at_bias:][: 4 * vocabulary].view(torch.float32).copy_(bias)
    _call("lay_out_decoder", narrow, top, vocabulary, weight.contiguous(), begin + at_decoder)
    for kind, one_hot, inputs, hidden, weights, places in parts:
        contiguous = [tensor.contiguous() for tensor in weights]
        begins = [begin + at for at in places]
        _call("lay_out_layer", kind, narrow, one_hot, inputs, hidden, *contiguous, *begins)
    return packed


_library.define("step(Tensor packed, Tensor ids, Tensor(a!) state, int vocab_size) -> (Tensor, Tensor)")


@torch.library.impl(_library, "step", "CPU")
def _step(packed: Tensor, ids: Tensor, state: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """One token for each of B streams through a model from `pack`.

    Args:
        packed: the model.
        ids: (B,).
        state: for each layer h (B, H), and for an LSTM c (B, H), flat, one after the other; changed in place.
        vocab_size: V.

    Returns:
        logits (B, V to a multiple of 16, the rest -inf) and the logarithm of the sum of their exponentials (B,).
    """
    logits, normaliser = _step_shapes(packed, ids, state, vocab_size)
    ids = ids.long().contiguous()
    size = state.numel()
    _call("step_of_model", packed, torch.get_num_threads(), len(ids), ids, state, size, logits, normaliser)
    return logits, normaliser


@torch.library.register_fake("unrolled::step", lib=_library)
def _step_shapes(packed: Tensor, ids: Tensor, state: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    return state.new_empty(ids.shape[0], (vocab_size + 15) // 16 * 16), state.new_empty(ids.shape[0])


_library.define("largest(Tensor values, int k) -> (Tensor, Tensor)")


@torch.library.impl(_library, "largest", "CPU")
def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of values (N,), falling, and their places; those of equal size by rising place."""
    if not 1 <= k <= len(values):
        raise ValueError(f"k must be from 1 to {len(values)}, not {k}")
    found, places = _largest_shapes(values, k)
    _call("largest_of", len(values), k, values.contiguous(), places, found)
    return found, places


@torch.library.register_fake("unrolled::largest", lib=_library)
def _largest_shapes(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return values.new_empty(k), values.new_empty(k, dtype=torch.int64)


_library.define("likeliest(Tensor packed, Tensor id, Tensor(a!) state, int k) -> (Tensor, Tensor)")


@torch.library.impl(_library, "likeliest", "CPU")
def likeliest(packed: Tensor, id: Tensor, state: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`step` of one stream, and the k likeliest tokens after it: log-probabilities (k,), falling, and ids (k,).

    Called as it is, it saves the time that PyTorch takes to call an operator, a tenth of the whole.
    """
    _expect((id, (1,)))
    log_probs, ids = torch.empty(k), torch.empty(k, dtype=torch.int64)
    id = id.long()
    _call("likeliest_of_model", packed, torch.get_num_threads(), id, state, state.numel(), k, ids, log_probs)
    return log_probs, ids


@torch.library.register_fake("unrolled::likeliest", lib=_library)
def _likeliest_shapes(packed: Tensor, id: Tensor, state: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return state.new_empty(k), state.new_empty(k, dtype=torch.int64)
