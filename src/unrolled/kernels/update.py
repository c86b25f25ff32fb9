"""The optimiser's step as a PyTorch operator; its plain twin is `clip_by_global_norm` with PyTorch's SGD or AdamW."""

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


def _expect_of(parameters: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for parameter, other in zip(parameters, others, strict=True):
        expect((other, tuple(parameter.shape)))


def _expect_to_change(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        expect((tensor, tuple(tensor.shape)))
        if not tensor.is_contiguous():
            raise ValueError("a kernel changes contiguous parameters only")


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
    _expect_of(parameters, gradients)
    _expect_to_change(changed)
    height = count = width = 0
    if table is not None and ids is not None and rows is not None:
        (height, width), count = table.shape, len(ids)
        expect((ids, (count,)), ids=True)
        expect((rows, (count, width)))
        ids, rows = as_int64(ids).contiguous(), rows.contiguous()
    dense, norm = [gradient.contiguous() for gradient in gradients], torch.empty((), dtype=torch.float64, device="cpu")
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


operators.define(
    "clip_and_adapt("
    "Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] means, Tensor(c!)[] squares, int[] steps, "
    "float max_norm, float rate, float[] betas, float epsilon, float weight_decay"
    ") -> Tensor"
)


@torch.library.impl(operators, "clip_and_adapt", "CPU")
def clip_and_adapt(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], means: Sequence[Tensor], squares: Sequence[Tensor],
    steps: Sequence[int], max_norm: float, rate: float, betas: Sequence[float], epsilon: float, weight_decay: float
) -> Tensor:  # fmt: skip
    """A step of AdamW by gradients that are clipped to `max_norm` all together, where their norm is finite.

    Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2, as PyTorch has it.

    Args:
        parameters: contiguous, changed in place, of which PyTorch is told.
        gradients: of these, in their shapes.
        means, squares: the moving averages of gradients and of their squares; contiguous, changed in place.
        steps: which step this is of each parameter, from 1.
        max_norm: above it the gradients are scaled down to it.
        rate: the learning rate.
        betas: how much of either average remains.
        epsilon: added to the root of the squares.
        weight_decay: times the rate, the share of a parameter that is taken away.

    Returns:
        The global norm before clipping, an f64 scalar, as of `clip_and_descend`.
    """
    for others in (gradients, means, squares):
        _expect_of(parameters, others)
    _expect_to_change([*parameters, *means, *squares])
    beta1, beta2 = betas
    rates = [rate / (1 - beta1**step) for step in steps]
    scales = [(1 - beta2**step) ** -0.5 for step in steps]
    several = ctypes.c_double * len(parameters)
    dense, norm = [gradient.contiguous() for gradient in gradients], torch.empty((), dtype=torch.float64, device="cpu")
    call(
        "clip_and_adapt", torch.get_num_threads(), len(parameters), _pointers(parameters), _pointers(dense),
        _pointers(means), _pointers(squares), _sizes(dense), several(*rates), several(*scales), max_norm,
        1 - rate * weight_decay, beta1, beta2, epsilon, norm,
    )  # fmt: skip
    torch.autograd.graph.increment_version([*parameters, *means, *squares])
    return norm


@torch.library.register_fake("unrolled::clip_and_adapt", lib=operators)
def _adapted_norm_shape(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], means: Sequence[Tensor], squares: Sequence[Tensor],
    steps: Sequence[int], max_norm: float, rate: float, betas: Sequence[float], epsilon: float, weight_decay: float
) -> Tensor:  # fmt: skip
    return torch.empty((), dtype=torch.float64)
