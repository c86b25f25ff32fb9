"""Optimiser, clipping by the global norm, learning-rate schedules."""

import math
from collections.abc import Iterable
from inspect import unwrap
from typing import TypeVar

import torch
from torch import nn

from unrolled.kernels import ops, update
from unrolled.nn.model import LanguageModel
from unrolled.recipe import Training

Kind = TypeVar("Kind", bound=torch.optim.Optimizer)


def _unguarded(kind: type[Kind]) -> type[Kind]:
    """PyTorch's, less what keeps its compiler out of some methods, and for that loads it: a second, and 70 MiB."""
    guarded = ("add_param_group", "state_dict", "load_state_dict", "step")
    return type(kind.__name__, (kind,), {name: torch.no_grad()(unwrap(getattr(kind, name))) for name in guarded})


SGD, AdamW = _unguarded(torch.optim.SGD), _unguarded(torch.optim.AdamW)


def make_optimizer(model: LanguageModel, training: Training) -> torch.optim.Optimizer:
    """The recipe's optimiser, PyTorch's own; the loop sets its rate before every step.

    Under SGD the embedding's gradient is sparse, unless it is the decoder's too: only the rows of a window's tokens
    change.
    """
    if training.optimizer == "sgd":
        if isinstance(model.embedding, nn.Embedding) and not model.has_tied_weights:
            model.embedding.sparse = True
        return SGD(model.parameters(), lr=training.learning_rate)
    return AdamW(model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)


def learning_rate(training: Training, epoch: int, step: int, total_steps: int) -> float:
    """The rate of one step.

    Args:
        training: the recipe's section.
        epoch: from 1.
        step: from 0, counted over all epochs.
        total_steps: of the whole training, where the cosine reaches 0.
    """
    if training.schedule == "decay":
        constant = training.constant_epochs + (training.decay_convention == "lua")
        return training.learning_rate * training.decay ** max(epoch - constant, 0)
    if training.schedule == "exponential":
        ratio = training.final_learning_rate / training.learning_rate
        return training.learning_rate * ratio ** min(step / max(total_steps - 1, 1), 1.0)
    warmup = min(training.warmup_steps, total_steps // 10)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    after = (step - warmup) / max(total_steps - warmup, 1)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * min(after, 1.0)))


@torch.no_grad()
def clip_and_step(optimizer: torch.optim.Optimizer, max_norm: float, norm_convention: str = "exact") -> float:
    """Clips the gradients by their global norm, steps, and lets go of them; in one pass where kernels serve.

    Args:
        optimizer: of one group.
        max_norm: the most that the norm may be.
        norm_convention: "exact"; or "tensorflow", whose `clip_by_global_norm` takes the norm of a sparse gradient as it
            comes, each occurrence of a token by itself, which is mostly smaller.

    Returns:
        The norm before clipping. Where it is not finite there is no step.
    """
    (group,) = optimizer.param_groups
    parameters = group["params"]
    serves = all(ops.serves(parameter) and parameter.is_contiguous() for parameter in parameters)
    if serves and _is_plain(optimizer, (torch.optim.SGD, SGD), "momentum", "weight_decay", "maximize"):
        norm = _descend(parameters, group["lr"], max_norm, norm_convention)
    elif serves and _is_plain(optimizer, (torch.optim.AdamW, AdamW), "amsgrad", "maximize"):
        norm = _adapt(optimizer, max_norm)
    else:
        norm = clip_by_global_norm(parameters, max_norm, norm_convention)
        if math.isfinite(norm):
            optimizer.step()
    for parameter in parameters:  # what `zero_grad` does, which takes ten times as long to say so
        parameter.grad = None
    return norm


@torch.no_grad()
def clip_by_global_norm(parameters: Iterable[nn.Parameter], max_norm: float, norm_convention: str = "exact") -> float:
    """Scales all gradients by one factor so that their global norm is at most `max_norm`; returns the norm before.

    Pascanu et al. 2013 (arXiv 1211.5063), algorithm 1. The squares of a row are summed in f32, rows and tensors in f64:
    over a whole 10,000 x 200 gradient PyTorch's f32 norm came out 4e-4 too low, which moves the clipping.
    """
    values = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse and norm_convention == "exact":
            parameter.grad = parameter.grad.coalesce()  # each row once
        if parameter.grad is not None:
            values.append(parameter.grad._values() if parameter.grad.is_sparse else parameter.grad)
    norm = torch.stack([torch.linalg.vector_norm(value, dim=-1).double().norm() for value in values]).norm().item()
    if norm > max_norm:
        torch._foreach_mul_(values, max_norm / norm)
    return norm


def _is_plain(optimizer: torch.optim.Optimizer, kinds: tuple[type, type], *unlike: str) -> bool:
    (group,) = optimizer.param_groups
    numbers = group["lr"], *group.get("betas", ())  # which PyTorch would take as tensors, too
    return (
        type(optimizer) in kinds
        and not any(group[name] for name in unlike)
        and all(isinstance(number, float | int) for number in numbers)
    )


def _descend(parameters: list[nn.Parameter], rate: float, max_norm: float, norm_convention: str) -> float:
    """`clip_by_global_norm` and a step of plain SGD, by the kernels."""
    pairs = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    dense = [(parameter, gradient) for parameter, gradient in pairs if not gradient.is_sparse]
    table = ids = rows = None
    for parameter, gradient in pairs:
        if gradient.is_sparse:  # the embedding's, the only one that may be
            table, ids, rows = parameter, gradient._indices()[0], gradient._values()
    apart = norm_convention == "tensorflow"
    targets, gradients = [parameter for parameter, _ in dense], [gradient for _, gradient in dense]
    return update.clip_and_descend(targets, gradients, table, ids, rows, apart, max_norm, rate).item()


def _adapt(optimizer: torch.optim.Optimizer, max_norm: float) -> float:
    """`clip_by_global_norm` and a step of AdamW, by the kernels; its averages are where PyTorch keeps them."""
    (group,) = optimizer.param_groups
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    for parameter in parameters:
        if not optimizer.state[parameter]:
            averages = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": parameter.new_zeros(()), **averages}
    slots = [optimizer.state[parameter] for parameter in parameters]
    steps = [slot["step"] for slot in slots]
    norm = update.clip_and_adapt(
        parameters, [parameter.grad for parameter in parameters], [slot["exp_avg"] for slot in slots],
        [slot["exp_avg_sq"] for slot in slots], [int(step) + 1 for step in steps], max_norm, group["lr"],
        group["betas"], group["eps"], group["weight_decay"],
    ).item()  # fmt: skip
    if math.isfinite(norm):
        torch._foreach_add_(steps, 1)
    return norm
