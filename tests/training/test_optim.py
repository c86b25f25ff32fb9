"""Rates, clipping, optimisers."""

import copy
import math
from contextlib import nullcontext
from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import nn

from unrolled.kernels import build
from unrolled.nn.loss import loss
from unrolled.nn.model import LanguageModel
from unrolled.recipe import Training, load_recipe
from unrolled.training.optim import clip_and_step, clip_by_global_norm, learning_rate, make_optimizer


def test_the_rate_of_ptb_small_halves_from_the_fifth_epoch() -> None:
    training = load_recipe("ptb-small").training
    rates = [learning_rate(training, epoch, 0, 1) for epoch in range(1, 14)]
    assert rates == [1.0] * 4 + [0.5**n for n in range(1, 10)]


def test_the_lua_original_lowers_the_rate_an_epoch_later() -> None:
    training = load_recipe("ptb-small").changed({"training.decay_convention": "lua"}).training
    assert [learning_rate(training, epoch, 0, 1) for epoch in range(1, 8)] == [1.0] * 5 + [0.5, 0.25]


def test_the_exponential_rate_falls_by_one_factor_a_step_to_the_final_one() -> None:
    training = Training(schedule="exponential", learning_rate=2.5, final_learning_rate=0.1)
    rates = [learning_rate(training, 1, step, 101) for step in range(101)]
    assert (rates[0], rates[-1]) == (2.5, pytest.approx(0.1))
    factors = [b / a for a, b in pairwise(rates)]
    assert factors == pytest.approx([0.04**0.01] * 100)
    assert learning_rate(training, 1, 0, 1) == 2.5


def test_the_cosine_warms_up_and_ends_at_zero() -> None:
    training = Training(schedule="cosine", warmup_steps=10, learning_rate=0.4)
    rates = [learning_rate(training, 1, step, 110) for step in range(111)]
    assert rates[:10] == pytest.approx([0.04 * n for n in range(1, 11)])
    assert rates[60] == pytest.approx(0.2)
    assert rates[110] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(learning_rate(training, 1, step, 30) for step in range(30)) == pytest.approx(
        0.4
    )  # of few steps, a tenth


def parameters(*gradients: torch.Tensor) -> list[nn.Parameter]:
    made = []
    for gradient in gradients:
        made.append(nn.Parameter(torch.zeros_like(gradient)))
        made[-1].grad = gradient.clone()
    return made


def test_clipping_is_by_the_norm_of_all_gradients_together() -> None:
    clipped = parameters(torch.tensor([3.0]), torch.tensor([[4.0, 12.0]]))
    assert clip_by_global_norm(clipped, 6.5) == pytest.approx(13)
    torch.testing.assert_close(clipped[1].grad, torch.tensor([[2.0, 6.0]]))
    assert clip_by_global_norm(clipped, 6.6) == pytest.approx(6.5)
    torch.testing.assert_close(clipped[0].grad, torch.tensor([1.5]))


def test_the_norm_of_a_large_gradient_is_exact() -> None:
    """PyTorch's f32 norm over such a gradient is several 1e-4 too low."""
    torch.manual_seed(0)
    gradient = torch.randn(10_000, 200) * 1e-3
    exact = math.sqrt(gradient.double().square().sum().item())
    assert clip_by_global_norm(parameters(gradient), 1e9) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(value: float) -> None:
    assert not math.isfinite(clip_by_global_norm(parameters(torch.tensor([1.0, value])), 5.0))


def test_an_sgd_of_ones_own_steps_as_pytorch_has_it() -> None:
    torch.manual_seed(1)
    model, ids = LanguageModel(300, 8, [12]), torch.randint(300, (3, 2))
    plain = copy.deepcopy(model)
    for each, native in ((model, True), (plain, False)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
        for _ in range(3):
            each.nll(ids, ids, each.initial_state(2))[0].backward()
            if native:
                clip_and_step(optimizer, 1e9)
            else:
                optimizer.step()
                optimizer.zero_grad()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_recipes_optimizer_is_pytorchs(kind: Literal["sgd", "adamw"]) -> None:
    """Steps taken by themselves, what is kept of them, and going on from that."""
    torch.manual_seed(1)
    model, ids = LanguageModel(300, 8, [12]), torch.randint(300, (3, 2))
    plain, training = copy.deepcopy(model), Training(optimizer=kind, learning_rate=0.1, weight_decay=0.2)
    theirs: torch.optim.Optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    if kind == "adamw":
        theirs = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.2, fused=True)
    for _ in range(3):
        ours = make_optimizer(model, training)
        assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for each, optimizer in ((model, ours), (plain, theirs)):
            each.nll(ids, ids, each.initial_state(2))[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert isinstance(ours, type(theirs))
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_rate_may_be_a_tensor(kind: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(1)
    results = []
    for rate in (0.1, torch.tensor(0.1)):
        parameter = nn.Parameter(torch.ones(5))
        parameter.grad = torch.arange(5.0)
        clip_and_step(kind([parameter], lr=rate), 1.0)  # type: ignore[call-arg]
        results.append(parameter.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("max_norm", [1e-2, 1e9])
@pytest.mark.parametrize("norm_convention", ["exact", "tensorflow"])
def test_sgd_takes_the_clipped_gradient_from_the_weights(kernels: bool, max_norm: float, norm_convention: str) -> None:
    """Against the same in plain terms; tokens that occur twice, and those that do not occur."""
    torch.manual_seed(1)
    model = LanguageModel(300, 8, [12])
    plain = copy.deepcopy(model)
    inputs, targets = torch.tensor([[1, 5], [5, 5], [7, 1]]), torch.randint(300, (3, 2))
    loss(plain(inputs, plain.initial_state(2))[0], targets)[0].backward()
    gradients = [parameter.grad for parameter in plain.parameters()]
    if norm_convention == "tensorflow":  # the embedding's from before the occurrences of a token were added up
        vectors = plain.embedding(inputs).detach().requires_grad_()
        apart = copy.deepcopy(plain)
        apart.embedding = nn.Identity()
        loss(apart(vectors, apart.initial_state(2))[0], targets)[0].backward()
        gradients[0] = vectors.grad
    norm = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]).norm().item()
    with nullcontext() if kernels else build.switched_off():
        optimizer = make_optimizer(model, Training(learning_rate=0.5))
        model.nll(inputs, targets, model.initial_state(2))[0].backward()
        assert clip_and_step(optimizer, max_norm, norm_convention) == pytest.approx(norm, rel=1e-5)
    for after, before in zip(model.parameters(), plain.parameters(), strict=True):
        assert before.grad is not None
        step = 0.5 * min(1.0, max_norm / norm) * before.grad
        torch.testing.assert_close(after, before - step, rtol=1e-5, atol=1e-6)
        assert after.grad is None


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_there_is_no_step_where_the_gradient_is_not_finite(optimizer: str) -> None:
    model = LanguageModel(300, 8, [12])
    before = copy.deepcopy(model.state_dict())
    made = make_optimizer(model, Training.model_validate({"optimizer": optimizer}))
    nll, _, _ = model.nll(
        torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2, dtype=torch.int64), model.initial_state(2)
    )
    (nll * math.inf).backward()
    assert not math.isfinite(clip_and_step(made, 5.0))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_adamw_decays_the_weights() -> None:
    model = LanguageModel(300, 8, [12])
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, Training(optimizer="adamw", learning_rate=0.1, weight_decay=0.2))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    clip_and_step(optimizer, 5.0)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name] * 0.98)
