"""Summed nats and token counts; nats -> perplexity, bits. Sum, count, divide once."""

import math
from typing import Any, TypeGuard, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unrolled.kernels import ops
from unrolled.nn.rounding import is_asked, product

_MOST_LOGITS = 1 << 27
_FAST_DEPTH, _SUMMED, _FAR = 32, 256, 1e30


def loss_plain(logits: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """The oracle of `loss`: the same through `torch.nn.functional.cross_entropy`."""
    nll_nats = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
    return nll_nats, targets.numel()


def loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Negative log-likelihood of the targets, summed over time and streams, in nats.

    The gradient is written into the memory of the log-probabilities, so a second `backward` is an error. That saves the
    largest array of a step.

    Args:
        logits: (T, B, V), any finite values; the maximum is taken out before anything is raised to e.
        targets: (T, B) ids.

    Returns:
        The sum (a scalar in the logits' precision, at least f32) and the number of targets.
    """
    return _SummedNLL.apply(logits.flatten(0, -2), targets.flatten()), targets.numel()


def decoder_loss(hidden: Tensor, decoder: nn.Module, targets: Tensor) -> tuple[Tensor, int]:
    """The loss of what a decoder makes of the hidden layer; the kernels never hold all logits, nor for very many do we.

    Args:
        hidden: (T, B, H), or any shape that ends in H.
        decoder: a linear layer to V logits, or what else yields them.
        targets: ids, in the shape of `hidden` but for H.

    Returns:
        As `loss`.

    Raises:
        ValueError: the targets are not in that shape.
    """
    _refuse_misplaced(hidden, targets)
    if _has_kernel(decoder):
        return token_nll(hidden, decoder, targets).sum(), targets.numel()
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    parts = math.ceil(len(targets) * getattr(decoder, "out_features", 0) / _MOST_LOGITS)
    if parts <= 1:
        return _loss_at_once(hidden, decoder, targets), len(targets)
    sums = [  # the backward pass makes the logits of each part again
        checkpoint(_loss_at_once, some, decoder, following, use_reentrant=False, preserve_rng_state=False)
        for some, following in zip(hidden.tensor_split(parts), targets.tensor_split(parts), strict=True)
    ]
    return torch.stack(sums).sum(), len(targets)


def _refuse_misplaced(hidden: Tensor, targets: Tensor) -> None:
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(f"targets of shape {tuple(targets.shape)} are not those of {tuple(hidden.shape[:-1])} tokens")


def _loss_at_once(hidden: Tensor, decoder: nn.Module, targets: Tensor) -> Tensor:
    if _is_narrow(decoder, hidden):
        return token_nll(hidden, decoder, targets).sum()
    with torch.autocast(hidden.device.type, enabled=False):
        return loss(decoder(_as_it_takes(hidden, decoder)), targets)[0]


def _as_it_takes(hidden: Tensor, decoder: nn.Module) -> Tensor:
    """Autocast may have narrowed it."""
    weight = getattr(decoder, "weight", None)
    return hidden.to(weight.dtype) if isinstance(weight, Tensor) else hidden.float()


def _has_kernel(decoder: nn.Module) -> TypeGuard[nn.Linear]:
    return isinstance(decoder, nn.Linear) and decoder.bias is not None and ops.serves(decoder.weight)


def _is_narrow(decoder: nn.Module, hidden: Tensor) -> TypeGuard[nn.Linear]:
    """On PyTorch alone a vocabulary of characters is faster in f32."""
    return (
        isinstance(decoder, nn.Linear)
        and decoder.bias is not None
        and decoder.out_features > ops.FEW_WORDS
        and is_asked(hidden.device.type)
    )


def token_nll_plain(hidden: Tensor, decoder: nn.Module, targets: Tensor) -> Tensor:
    """The oracle of `token_nll`."""
    logits = decoder(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def token_nll(hidden: Tensor, decoder: nn.Module, targets: Tensor) -> Tensor:
    """Each target's negative log-likelihood in nats, in the shape of `targets`; the arguments are `decoder_loss`'s."""
    _refuse_misplaced(hidden, targets)
    if not _has_kernel(decoder):
        if _is_narrow(decoder, hidden):
            nll = _NarrowDecoder.apply(hidden.flatten(0, -2), decoder.weight, decoder.bias, targets.flatten())
            return nll.view_as(targets)
        with torch.autocast(hidden.device.type, enabled=False):
            return token_nll_plain(_as_it_takes(hidden, decoder), decoder, targets)
    narrow, keep = is_asked("cpu"), torch.is_grad_enabled()
    hidden = hidden.flatten(0, -2).float()
    nll, *_ = ops.decoder_nll(hidden, decoder.weight, decoder.bias, targets.flatten(), narrow, keep)
    return nll.view_as(targets)


@final
class _SummedNLL(torch.autograd.Function):
    """d nll / d logits = softmax(logits) - onehot(targets)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        log_probs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        ctx.save_for_backward(log_probs, targets.unsqueeze(-1))
        ctx.dtype = logits.dtype
        return -log_probs.gather(-1, targets.unsqueeze(-1)).sum()

    @staticmethod
    @ops.once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        log_probs, targets = ctx.saved_tensors
        (gradient,) = gradients
        probabilities = log_probs.exp_()
        probabilities.scatter_add_(-1, targets, probabilities.new_full((), -1.0).expand(targets.shape))
        return probabilities.mul_(gradient).to(ctx.dtype), None


@final
class _NarrowDecoder(torch.autograd.Function):
    """`token_nll` in bf16 on PyTorch alone: one array of logits, raised to e in place and kept for the backward pass.

    A token's exponentials are relative to its target's logit, so the logarithm of their sum is the cost; where that
    comes near the end of what a float holds, they are relative to the largest. Bias and target's logit are columns
    of the one product, [hidden, 1, -logit] by [weight, bias, 1], which then has the bias's gradient too. The target's
    own term, probability less 1, is kept out of the products and added in f32: where the model is sure of it, the two
    all but cancel.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        size = hidden.shape[1]
        columns = math.ceil((size + 2) / _FAST_DEPTH) * _FAST_DEPTH
        narrow_hidden, narrow_weight = (
            each.new_zeros(len(each), columns, dtype=torch.bfloat16) for each in (hidden, weight)
        )
        narrow_weight[:, :size], narrow_weight[:, size], narrow_weight[:, size + 1] = weight, bias, 1
        narrow_hidden[:, :size], narrow_hidden[:, size] = hidden, 1
        target = (narrow_hidden.float() * narrow_weight[targets]).sum(-1, keepdim=True)
        narrow_hidden[:, size + 1] = -target.squeeze(-1)
        shift = -narrow_hidden[:, size + 1].float().unsqueeze(-1)
        exponentials = product(narrow_hidden, narrow_weight.T).exp_()  # (N, V)
        sums = _sums_of_rows(exponentials)
        if not ((sums > 1 / _FAR) & (sums < _FAR)).all():
            logits = product(narrow_hidden, narrow_weight.T)
            largest = logits.amax(-1, keepdim=True)
            shift, exponentials = shift + largest, logits.sub_(largest).exp_()
            sums = _sums_of_rows(exponentials)
        own = exponentials.gather(1, targets.unsqueeze(-1)).float()
        exponentials.scatter_(1, targets.unsqueeze(-1), 0.0)
        ctx.save_for_backward(narrow_hidden, narrow_weight, targets, exponentials, sums, own)
        ctx.size = size
        return (sums.log() + (shift - target)).squeeze(-1)

    @staticmethod
    @ops.once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        hidden, weight, targets, exponentials, sums, own = ctx.saved_tensors
        gradient, size = gradients[0].unsqueeze(-1), ctx.size
        factor = gradient / sums
        of_target = own * factor - gradient
        d_hidden = product(exponentials, weight)[:, :size] * factor
        d_hidden += weight[targets, :size] * of_target
        d_columns = product(exponentials.T, (hidden * factor).bfloat16())
        d_weight, d_bias = d_columns[:, :size].float(), d_columns[:, size].float()
        d_weight.index_add_(0, targets, hidden[:, :size] * of_target)
        d_bias.index_add_(0, targets, of_target.squeeze(-1))
        return d_hidden, d_weight, d_bias, None


def _sums_of_rows(x: Tensor) -> Tensor:
    """x (N, V) in bf16 -> (N, 1) in f32, without x in f32: sums of a few hundred at a time, each rounded to bf16."""
    whole = x.shape[1] // _SUMMED * _SUMMED
    sums = x[:, :whole].unflatten(-1, (-1, _SUMMED)).sum(-1).sum(-1, keepdim=True, dtype=torch.float32)
    return sums + x[:, whole:].sum(-1, keepdim=True, dtype=torch.float32)


def perplexity(nll_nats: float, tokens: int) -> float:
    """e to the mean nats per token; infinite where that leaves the range of a float."""
    try:
        return math.exp(nll_nats / tokens)
    except OverflowError:
        return math.inf


def bits_per(nll_nats: float, count: int) -> float:
    """Mean bits for each of `count` tokens or characters."""
    return nll_nats / math.log(2) / count
