"""Optimiser, clipping by the global norm, learning-rate schedules."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from unrolled.recipe import Training


def make_optimizer(parameters: Iterable[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """The recipe's optimiser, PyTorch's fused one; the loop sets its rate before every step."""
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=training.learning_rate, fused=True)
    return torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)


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
def clip_by_global_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scales all gradients by one factor so that their global norm is at most `max_norm`; returns the norm before.

    Pascanu et al. 2013 (arXiv 1211.5063), algorithm 1. The squares of a row are summed in f32, rows and tensors in f64:
    over a whole 10,000 x 200 gradient PyTorch's f32 norm came out 4e-4 too low, which moves the clipping.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(gradient, dim=-1).double().norm() for gradient in gradients]
    norm = torch.stack(norms).norm().item()
    if norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm
