"""What a recipe asks of its steps reaches them."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from unrolled import Recipe
from unrolled.data.batches import Windows
from unrolled.recipe import Training
from unrolled.run import build_model
from unrolled.training.loop import run_epoch
from unrolled.training.optim import learning_rate, make_optimizer
from unrolled.training.resume import Position

IDS = np.random.default_rng(1).integers(0, 30, 400)
SMALL = {"model.embedding_size": 8, "model.hidden_sizes": "8", "training.batch_size": 4, "training.num_steps": 5}


def steps(position: Position | None = None, **changes: Any) -> tuple[Training, list[dict[str, float]]]:
    """The recipe's training, and the figures of each step of an epoch."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    recipe = Recipe().changed(SMALL | {"training.precision": "f32"} | named)
    torch.manual_seed(2)
    model = build_model(recipe.model, 30)
    windows = Windows(IDS, recipe.training.batch_size, recipe.training.num_steps)
    figures: list[dict[str, float]] = []

    def after_step(states: Any, found: dict[str, float]) -> bool:
        figures.append(found)
        return True

    optimizer = make_optimizer(model, recipe.training)
    run_epoch(
        model,
        optimizer,
        windows,
        model.initial_state(4),
        recipe.training,
        position or Position(),
        after_step,
    )
    return recipe.training, figures


def test_the_rate_of_every_step_is_the_schedules_times_what_accidents_left_of_it() -> None:
    for factor in (1.0, 0.25):
        training, found = steps(Position(rate_factor=factor), training__schedule="exponential", training__max_epochs=3)
        expected = [factor * learning_rate(training, 1, step, 3 * len(found)) for step in range(len(found))]
        assert [step["learning_rate"] for step in found] == pytest.approx(expected)
    assert len(set(expected)) > 10


@pytest.mark.parametrize(
    "changes",
    [
        {"model__dropout": 0.5},
        {"model__draw_decoder_bias": True},
        {"model__draw_layer_biases": True},
        {"model__init_scale": 0.3},
        {"model__tie_weights": True},
        {"model__join": "add", "model__draw_layer_biases": True},
        {"training__norm_convention": "tensorflow"},
        {"training__precision": "bf16"},
        {"training__max_grad_norm": 0.01},
        {"training__learning_rate": 0.03},
    ],
    ids=str,
)
def test_what_a_recipe_says_changes_its_steps(changes: dict[str, Any]) -> None:
    sgd: dict[str, Any] = {"training__optimizer": "sgd", "training__schedule": "decay", "training__learning_rate": 1.0}
    (_, plain), (_, changed) = steps(**sgd), steps(None, **sgd | changes)
    names = ("nll_nats_per_token", "grad_norm")
    assert [[step[name] for name in names] for step in plain] != [[step[name] for name in names] for step in changed]
    assert all(math.isfinite(step["grad_norm"]) for step in changed)
