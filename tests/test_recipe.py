"""Recipes: TOML in and out, every value bounded, every error one line that names the option."""

from collections.abc import Callable
from pathlib import Path

import pytest

from unrolled import Recipe, UnrolledError, load_recipe
from unrolled.recipe import FIELDS, recipe_header, shipped_recipes
from unrolled.run import num_parameters
from unrolled.training.optim import learning_rate

Write = Callable[[str, bytes | str], Path]


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_named_after_its_file_and_opens_with_its_command(name: str) -> None:
    assert load_recipe(name).name == name
    command = recipe_header(name).splitlines()[0]
    assert command == ("unrolled train" if name == "demo" else f"unrolled train {name}")


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_written_out_is_the_recipe(name: str, write: Write) -> None:
    recipe = load_recipe(name).changed({"data.corpus": 'C:\\odd "path"\n\x7f.txt'})
    assert load_recipe(write("copy.toml", recipe.to_toml())) == recipe
    for field in FIELDS:
        assert field.split(".")[1] in recipe.to_toml()


def test_every_field_says_what_it_is() -> None:
    for section in ("data", "model", "training"):
        for field in type(getattr(Recipe(), section)).model_fields.values():
            assert field.description


def test_ptb_small_is_the_reference_configuration() -> None:
    recipe = load_recipe("ptb-small")
    model, training = recipe.model, recipe.training
    assert (model.embedding_size, model.hidden_sizes, model.dropout, model.init_scale) == (200, (200, 200), 0, 0.1)
    assert (training.batch_size, training.num_steps, training.max_epochs, training.max_grad_norm) == (20, 20, 13, 5)
    assert model.forget_bias == 0


@pytest.mark.parametrize(
    ("name", "sizes", "count", "rates"),
    [
        ("ptb-medium", (650, (650, 650), 0.5, 0.05, 35, 39, 5), 19_780_400, [1] * 7 + [1 / 1.2, 1 / 1.2**2]),
        ("ptb-large", (1500, (1500, 1500), 0.65, 0.04, 35, 55, 10), 66_022_000, [1] * 14 + [1 / 1.15, 1 / 1.15**2]),
        ("ptb-notebook", (200, (256, 128), 0, 0.1, 20, 15, 5), 3_955_088, [1] * 5 + [0.5, 0.25]),
    ],
)
def test_the_references_are_kept_to_the_letter(
    name: str, sizes: tuple[object, ...], count: int, rates: list[float]
) -> None:
    recipe = load_recipe(name)
    model, training = recipe.model, recipe.training
    drawn = (model.embedding_size, model.hidden_sizes, model.dropout, model.init_scale)
    assert (*drawn, training.num_steps, training.max_epochs, training.max_grad_norm) == sizes
    assert num_parameters(model, 10_000) == count
    assert training.batch_size == (60 if name == "ptb-notebook" else 20)
    assert [learning_rate(training, epoch, 0, 1) for epoch in range(1, len(rates) + 1)] == pytest.approx(rates)


def test_the_character_networks_are_what_their_names_say() -> None:
    for name, cell, activation, join, steps in (
        ("elman", "elman", "tanh", "concatenate", 20),
        ("elman-add", "elman", "tanh", "add", 20),
        ("elman-relu", "elman", "relu", "concatenate", 40),
        ("jordan", "jordan", "tanh", "concatenate", 20),
        ("lstm", "lstm", "tanh", "concatenate", 20),
    ):
        recipe = load_recipe(f"text8-{name}")
        model, training = recipe.model, recipe.training
        assert (model.cell, model.activation, model.join, training.num_steps) == (cell, activation, join, steps)
        assert (model.embedding_size, recipe.data.tokens, recipe.data.unknown) == (0, "character", False)
        assert (training.schedule, training.learning_rate, training.final_learning_rate) == ("exponential", 2.5, 0.1)


def test_an_option_of_another_cell_is_refused() -> None:
    for changes, expected in (
        ({"model.cell": "gru", "model.join": "add"}, "model.join is an option of lstm and elman, not of gru"),
        ({"model.cell": "gru", "model.forget_bias": 1.0}, "model.forget_bias is an option of lstm, not of gru"),
        ({"model.cell": "jordan"}, "--model.embedding-size 0, a single one of --model.hidden-sizes, --model.dropout 0"),
    ):
        with pytest.raises(UnrolledError, match=expected):
            Recipe().changed(changes)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("training.num_steps", "0", "--training.num-steps must be at least 1, not 0"),
        ("training.max_epochs", "1.5", "--training.max-epochs must be a whole number, not 1.5"),
        ("training.learning_rate", "fast", "--training.learning-rate must be a number, not fast"),
        ("training.learning_rate", "inf", "--training.learning-rate must be a finite number, not inf"),
        ("training.learning_rate", "0", "--training.learning-rate must be more than 0"),
        ("training.seed", str(1 << 63), "--training.seed must be below 2 to the 63rd"),
        ("training.optimizer", "adam", "--training.optimizer must be 'sgd' or 'adamw', not adam"),
        ("model.dropout", "1", "--model.dropout must be less than 1"),
        ("model.hidden_sizes", "200,many", "--model.hidden-sizes must be a whole number, not many"),
        ("model.hidden_sizes", "", "--model.hidden-sizes must be a whole number, not ''"),
        ("model.hidden_sizes", "200,0", "--model.hidden-sizes must be at least 1, not 0"),
        ("data.unknown", "perhaps", "--data.unknown must be true or false, not perhaps"),
        ("data.tokens", "words", "--data.tokens must be 'word', 'character', 'byte' or 'bpe', not words"),
        ("training.num_stepz", "3", "no recipe field 'training.num_stepz'; did you mean 'training.num_steps'?"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_bound(option: str, value: str, expected: str) -> None:
    with pytest.raises(UnrolledError) as caught:
        Recipe().changed({option: value})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UnrolledError, match="without <unk> the vocabulary has to keep every token"):
        Recipe().changed({"data.unknown": False, "data.min_count": 2})
    with pytest.raises(UnrolledError, match="257 to 1,000,000 for bpe"):
        Recipe().changed({"data.tokens": "bpe", "data.vocab_size": 100})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[training]\nnum_steps = 0", "mine.toml: training.num_steps must be at least 1, not 0"),
        ("[training]\nbacth_size = 3", "did you mean 'training.batch_size'"),
        ("[trainig]\n", "mine.toml: trainig: there is no such field"),
        ("training = 3", "mine.toml: training must be a table"),
        ("this is not toml", "mine.toml is not a recipe in TOML"),
        (b"\xff\xfe", "mine.toml is not a recipe in TOML: it is in UTF-16; save it as UTF-8"),
        ("name = '../up'", "mine.toml: name"),
    ],
)
def test_a_bad_recipe_file_is_named(write: Write, content: bytes | str, expected: str) -> None:
    with pytest.raises(UnrolledError) as caught:
        load_recipe(write("mine.toml", content))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_may_leave_out_what_has_a_default(write: Write) -> None:
    recipe = load_recipe(write("my own.toml", "[training]\nmax_epochs = 3"))
    assert recipe.training.max_epochs == 3
    assert recipe.name == "my-own"


def test_a_byte_order_mark_is_no_part_of_a_recipe(write: Write) -> None:
    recipe = load_recipe(write("mine.toml", b"\xef\xbb\xbf[training]\nmax_epochs = 3"))
    assert recipe.training.max_epochs == 3


def test_an_unknown_recipe_gets_the_nearest() -> None:
    with pytest.raises(UnrolledError, match="no recipe named 'ptb-smal'; did you mean 'ptb-small'"):
        load_recipe("ptb-smal")


def test_what_differs_is_named() -> None:
    recipe = Recipe()
    changed = recipe.changed({"training.seed": 7, "model.hidden_sizes": "3,4"})
    assert recipe.differences(changed) == ["model.hidden_sizes", "training.seed"]
    assert changed.model.hidden_sizes == (3, 4)
