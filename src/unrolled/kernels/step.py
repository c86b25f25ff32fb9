"""One step of a whole model, as PyTorch operators: for those who read token by token.

The plain twin is the model itself, see `nn.stream.Stream`.
"""

import ctypes

import torch
from torch import Tensor

from unrolled.kernels.ops import GATES, KINDS, SLOTS, Layer, call, expect, operators

_HEADER, _LAYER = 9, 7
MOST_LAYERS = 64
_REMEMBERED = 1024
"""Tokens whose product with the first layer's weights is kept, each in the place of its id modulo this."""


def pack(
    layers: list[Layer], embedding: Tensor | None, weight: Tensor, bias: Tensor, narrow: bool, remembers: bool = False
) -> Tensor:
    """A model's weights laid out for `step`, as bytes; embedding (V, E) where the first layer reads vectors.

    With `remembers` there is room beside them for what the first layer makes of a token, which need not be computed
    again when a single stream comes to it again; the bytes are then those of one reader at a time.
    """
    if not 1 <= len(layers) <= MOST_LAYERS:
        raise ValueError(f"a packed model has 1 up to {MOST_LAYERS} layers")
    _expect_to_fit(layers, embedding, weight, bias)
    itemsize, parts, size = 2 if narrow else 4, [], (8 * (_HEADER + _LAYER * MOST_LAYERS) + 63) // 64 * 64

    def place(count: int, bytes_each: int) -> int:
        nonlocal size
        at, size = size, size + (count * bytes_each + 63) // 64 * 64
        return at

    vocabulary, top = weight.shape
    header = [0, narrow, len(layers), vocabulary]
    header += [place(embedding.numel() if embedding is not None else 0, 4)]
    header += [place((vocabulary + 15) // 16 * 16 * ((top + 31) // 32 * 32), itemsize), place(vocabulary, 4)]
    remembered = min(vocabulary, _REMEMBERED) if remembers and embedding is not None else 0
    header += [place(remembered, 8), remembered]
    for number, layer in enumerate(layers):
        inputs, hidden = layer.weights[0].shape[1], layer.weights[1].shape[1]
        kind, slots, one_hot = KINDS[layer.kind], SLOTS[KINDS[layer.kind]], number == 0 and embedding is None
        width, panels = (hidden + 15) // 16 * 16 * slots, ctypes.c_int64()
        call("layer_size", kind, narrow, one_hot, inputs, hidden, ctypes.addressof(panels))
        rows = inputs if one_hot else remembered if number == 0 else 0
        places = place(panels.value, itemsize), place(width, 4), place(rows * width, 4)
        header += [kind, one_hot, inputs, hidden, *places]
        parts.append((kind, one_hot, inputs, hidden, layer.weights, places))
    header[0], packed = size, torch.zeros(size, dtype=torch.uint8, device="cpu")
    begin = packed.data_ptr()
    packed[: 8 * len(header)].view(torch.int64).copy_(torch.tensor(header, device="cpu"))
    at_embedding, at_decoder, at_bias = header[4:7]
    if embedding is not None:
        packed[at_embedding:][: 4 * embedding.numel()].view(torch.float32).copy_(embedding.flatten())
    packed[at_bias:][: 4 * vocabulary].view(torch.float32).copy_(bias)
    call("lay_out_decoder", narrow, top, vocabulary, weight.contiguous(), begin + at_decoder)
    for kind, one_hot, inputs, hidden, weights, places in parts:
        contiguous = [tensor.contiguous() for tensor in weights]
        begins = [begin + at for at in places]
        call("lay_out_layer", kind, narrow, one_hot, inputs, hidden, *contiguous, *begins)
    return packed


def _expect_to_fit(layers: list[Layer], embedding: Tensor | None, weight: Tensor, bias: Tensor) -> None:
    below = len(weight) if embedding is None else embedding.shape[1]
    expect((weight, (len(weight), weight.shape[1])), (bias, (len(weight),)), (embedding, (len(weight), below)))
    for layer in layers:
        weight_ih, weight_hh, layer_bias = layer.weights
        of_gates, hidden = GATES[KINDS[layer.kind]] * weight_hh.shape[1], weight_hh.shape[1]
        expect((weight_ih, (of_gates, below)), (weight_hh, (of_gates, hidden)), (layer_bias, (of_gates,)))
        below = hidden
    if weight.shape[1] != below:
        raise ValueError(f"the decoder reads {weight.shape[1]} units, not {below}")


def _expect_in_place(packed: Tensor, state: Tensor) -> None:
    expect((state, (state.numel(),)))
    of_pack = packed.dtype == torch.uint8 and packed.device.type == "cpu" and packed.is_contiguous()
    if not of_pack or not state.is_contiguous():
        raise ValueError("a kernel expects the bytes of `pack` and a state that is contiguous")


operators.define("step(Tensor(a!) packed, Tensor ids, Tensor(b!) state, int vocab_size) -> (Tensor, Tensor)")


@torch.library.impl(operators, "step", "CPU")
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
    expect((ids, (len(ids),)), ids=True)
    _expect_in_place(packed, state)
    ids, count = ids.long().contiguous(), torch.get_num_threads()
    call(
        "step_of_model", packed, packed.numel(), count, len(ids), ids, state, state.numel(), vocab_size, logits,
        normaliser,
    )  # fmt: skip
    return logits, normaliser


@torch.library.register_fake("unrolled::step", lib=operators)
def _step_shapes(packed: Tensor, ids: Tensor, state: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    return state.new_empty(ids.shape[0], (vocab_size + 15) // 16 * 16), state.new_empty(ids.shape[0])


operators.define("likeliest(Tensor(a!) packed, Tensor id, Tensor(b!) state, int k) -> (Tensor, Tensor)")


@torch.library.impl(operators, "likeliest", "CPU")
def likeliest(packed: Tensor, id: Tensor, state: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`step` of one stream, and the k likeliest tokens after it: log-probabilities (k,), falling, and ids (k,).

    Called as it is, it saves the time that PyTorch takes to call an operator, a tenth of the whole.
    """
    expect((id, (1,)), ids=True)
    _expect_in_place(packed, state)
    log_probs, ids = state.new_empty(k), state.new_empty(k, dtype=torch.int64)
    id, count = id.long(), torch.get_num_threads()
    call("likeliest_of_model", packed, packed.numel(), count, id, state, state.numel(), k, ids, log_probs)
    return log_probs, ids


@torch.library.register_fake("unrolled::likeliest", lib=operators)
def _likeliest_shapes(packed: Tensor, id: Tensor, state: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return state.new_empty(k), state.new_empty(k, dtype=torch.int64)
