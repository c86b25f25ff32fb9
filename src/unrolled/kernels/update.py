"""The optimiser's step as one PyTorch operator; its plain twin is `clip_by_global_norm` with PyTorch's own SGD."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unrolled.kernels.ops import as_int64, call, expect, operators


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _sizes(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_int64 * len(tensors))(*(tensor.numel() for tensor in tensors))


operators.define(
    "clip_and_descend("
    "Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)? table, Tensor? ids, Tensor(c!)? rows, bool apart, "
    "float max_norm, float rate"
    ") -> Tensor"
)


@torch.library.impl(operators, "clip_and_descend", "CPU")
def clip_and_descend(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], table: Tensor | None, ids: Tensor | None,
    rows: Tensor | None, apart: bool, max_norm: float, rate: float
) -> Tensor:  # fmt: skip
    """A clipped step of SGD: parameters -= rate * min(1, max_norm / norm) * gradients, where the norm is finite.

    Args:
        parameters: contiguous, changed in place, of which PyTorch is told.
        gradients: of these, in their shapes.
        table: (V, E), one more parameter, of whose rows few change; or None.
        ids: (N,), the rows of the table that do, any as often as it likes.
        rows: (N, E), their gradients; those of one id are added up here.
        apart: the norm is taken before they are, as if they belonged to different rows.
        max_norm: above it the gradients are scaled down to it.
        rate: the learning rate.

    Returns:
        The global norm before clipping, an f64 scalar. Stretches are summed in f32, their sums in f64.
    """
    changed = [*parameters, table] if table is not None else list(parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        expect((gradient, tuple(parameter.shape)))
    for parameter in changed:
        expect((parameter, tuple(parameter.shape)))
        if not parameter.is_contiguous():
            raise ValueError("a kernel changes contiguous parameters only")
    height = count = width = 0
    if table is not None and ids is not None and rows is not None:
        (height, width), count = table.shape, len(ids)
        expect((ids, (count,)), ids=True)
        expect((rows, (count, width)))
        ids, rows = as_int64(ids).contiguous(), rows.contiguous()
    dense, norm = [gradient.contiguous() for gradient in gradients], torch.empty((), dtype=torch.float64)
    call(
        "clip_and_descend", torch.get_num_threads(), len(parameters), _pointers(parameters), _pointers(dense),
        _sizes(dense), count, width, height, table, ids, rows, apart, max_norm, rate, norm,
    )  # fmt: skip
    torch.autograd.graph.increment_version(changed)
    return norm


@torch.library.register_fake("unrolled::clip_and_descend", lib=operators)
def _norm_shape(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], table: Tensor | None, ids: Tensor | None,
    rows: Tensor | None, apart: bool, max_norm: float, rate: float
) -> Tensor:  # fmt: skip
    return torch.empty((), dtype=torch.float64)
