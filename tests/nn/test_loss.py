"""Summed nats against PyTorch's cross-entropy, in value and gradient, whatever the logits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers, sampled_from
from torch import nn

from unrolled.kernels import build
from unrolled.nn.loss import bits_per, decoder_loss, loss, loss_plain, perplexity, token_nll_plain


@given(T=integers(1, 9), B=integers(1, 7), V=integers(1, 50), scale=floats(0.01, 1e4))
def test_the_loss_is_the_plain_one(T: int, B: int, V: int, scale: float) -> None:
    torch.manual_seed(T + 10 * B + 100 * V)
    values, targets = torch.randn(T, B, V) * scale, torch.randint(V, (T, B))
    results = []
    for way in (loss_plain, loss):
        logits = values.clone().requires_grad_()
        nll_nats, count = way(logits, targets)
        assert count == T * B
        (gradient,) = torch.autograd.grad(nll_nats / 3, logits)
        results.append((nll_nats, gradient))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_very_many_logits_are_made_in_parts(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, decoder, targets = torch.randn(5, 3, 7, requires_grad=True), nn.Linear(7, 300), torch.randint(300, (5, 3))
    results = []
    with build.switched_off(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for most in (1 << 27, 1000):
            monkeypatch.setattr("unrolled.nn.loss._MOST_LOGITS", most)
            nll, count = decoder_loss(hidden, decoder, targets)
            results.append([nll, *torch.autograd.grad(nll, [hidden, *decoder.parameters()])])
            assert count == 15
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-2 if bf16 else 1e-5, atol=1e-2 if bf16 else 1e-6)


@given(
    tokens=integers(1, 40),
    hidden_size=integers(1, 70),
    vocab_size=integers(256, 900),
    scale=sampled_from([0.1, 1.0, 3.0]),
    seed=integers(0, 1000),
)
def test_in_bf16_without_kernels_it_is_the_plain_one(
    tokens: int, hidden_size: int, vocab_size: int, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    hidden, decoder = torch.randn(tokens, hidden_size) * scale, nn.Linear(hidden_size, vocab_size)
    targets, results = torch.randint(vocab_size, (tokens,)), []
    for plain in (True, False):
        leaf = hidden.clone().requires_grad_()
        with build.switched_off(), torch.autocast("cpu", torch.bfloat16, enabled=not plain):
            nll = token_nll_plain(leaf, decoder, targets).sum() if plain else decoder_loss(leaf, decoder, targets)[0]
        results.append([nll, *torch.autograd.grad(nll / 3, [leaf, *decoder.parameters()])])
    for plain, narrow in zip(*results, strict=True):
        assert (narrow - plain).norm() <= 0.01 * plain.norm()


@pytest.mark.parametrize("size", [85, 1e2, 1e4, 40_070])
def test_in_bf16_without_kernels_no_logits_are_too_large(size: float) -> None:
    decoder, targets = nn.Linear(1, 300), torch.tensor([299, 299, 0, 5])
    with torch.no_grad():
        decoder.weight.copy_(torch.linspace(-size, size, 300).unsqueeze(1))
        decoder.bias.zero_()
    hidden = torch.tensor([[1.0], [-1.0], [1.0], [0.0]], requires_grad=True)
    with build.switched_off(), torch.autocast("cpu", torch.bfloat16):
        nll, _ = decoder_loss(hidden, decoder, targets)
    assert nll.item() == pytest.approx(4 * size + math.log(300), rel=0.01)
    for gradient in torch.autograd.grad(nll, [hidden, *decoder.parameters()]):
        assert gradient.isfinite().all()


def test_logits_of_ten_thousand_are_no_overflow() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    for target, expected in ((0, 0.0), (1, 2e4), (2, 1e4)):
        nll_nats, _ = loss(logits, torch.tensor([[target]]))
        assert nll_nats.item() == expected
        (gradient,) = torch.autograd.grad(nll_nats, logits)
        assert gradient.isfinite().all()


def test_a_second_backward_is_an_error_and_not_a_wrong_gradient() -> None:
    logits = torch.randn(2, 3, 4, requires_grad=True)
    nll_nats, _ = loss(logits, torch.zeros(2, 3, dtype=torch.int64))
    nll_nats.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nll_nats.backward()


def test_figures_follow_from_sums() -> None:
    assert perplexity(10 * math.log(7), 10) == pytest.approx(7)
    assert bits_per(8 * math.log(2), 4) == pytest.approx(2)
    assert perplexity(1e6, 1) == math.inf
