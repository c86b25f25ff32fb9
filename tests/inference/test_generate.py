"""What comes next, and more of it."""

from collections import Counter

import pytest
import torch

from unrolled import Run, UnrolledError
from unrolled.inference.generate import draw, read_prefix


def test_predictions_are_probabilities_in_falling_order(toy_run: Run) -> None:
    found = toy_run.predict("the old dog that sees the cats", k=38)
    values = [value for _, value in found.words]
    assert values == sorted(values, reverse=True)
    assert 0.99 < sum(values) <= 1.0001  # all but <unk>
    assert "<unk>" not in dict(found.words)


def test_a_trained_model_keeps_the_number_in_mind(toy_run: Run) -> None:
    one, many = dict(toy_run.predict("the dog", 38).words), dict(toy_run.predict("the dogs", 38).words)
    assert one["walks"] > 10 * one["walk"]
    assert many["walk"] > 10 * many["walks"]


def test_unknown_is_left_out_unless_asked_for(character_run: Run, toy_run: Run) -> None:
    asked = toy_run.predict("the", k=1_000, unknown=True)
    assert "<unk>" in dict(asked.words)
    assert len(asked.words) == len(toy_run.predict("the", k=1_000).words) + 1
    assert len(character_run.predict("the", k=1_000).words) == len(character_run.tokenizer)


def test_a_prefix_is_read_as_the_beginning_of_a_line(toy_run: Run) -> None:
    log_probs, _ = read_prefix(toy_run.model, toy_run.tokenizer, "the dog")
    ids = torch.tensor([[toy_run.tokenizer.start_id, *toy_run.tokenizer.encode("the dog").tolist()]]).T
    with torch.inference_mode():
        logits, _ = toy_run.model(ids, toy_run.model.initial_state(1))
    torch.testing.assert_close(log_probs, logits[-1, 0].log_softmax(-1))


def test_the_same_seed_writes_the_same_text(toy_run: Run) -> None:
    texts = [toy_run.generate("the girl", length=60, seed=seed) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]
    assert "".join(toy_run.stream("the girl", length=60, seed=5)) == texts[0]


def test_what_is_written_goes_on_where_the_prompt_ends(toy_run: Run, character_run: Run) -> None:
    assert toy_run.generate("the old", length=1, temperature=0).startswith(" ")
    assert not toy_run.generate("birds sing\n", length=1, temperature=0).startswith(" ")
    assert character_run.generate("the ol", length=1, temperature=0) == "d"


def test_temperature_zero_and_one_candidate_are_greedy(toy_run: Run) -> None:
    greedy = toy_run.generate("the", length=30, temperature=0)
    assert greedy == toy_run.generate("the", length=30, top_k=1, seed=1)
    assert greedy == toy_run.generate("the", length=30, top_p=1e-9, seed=1)


def test_no_tokens_are_no_text(toy_run: Run) -> None:
    assert toy_run.generate("the", length=0) == ""


PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])


def drawn(**options: float) -> dict[int, float]:
    source = torch.Generator().manual_seed(0)
    temperature, top_k, top_p = options.get("temperature", 1.0), int(options.get("top_k", 0)), options.get("top_p", 1.0)
    counts = Counter(draw(PROBABILITIES.log(), source, temperature, top_k, top_p) for _ in range(4_000))
    return {id: count / 4_000 for id, count in sorted(counts.items())}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
        ({"temperature": 0.5}, {0: 0.01 / 0.3, 1: 0.16 / 0.3, 2: 0.04 / 0.3, 3: 0.09 / 0.3}),
        ({"top_k": 2}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_p": 0.7}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_p": 0.71}, {1: 4 / 9, 2: 2 / 9, 3: 3 / 9}),
        ({"top_k": 3, "top_p": 0.5}, {1: 4 / 7, 3: 3 / 7}),
    ],
)
def test_draws_are_distributed_as_asked(options: dict[str, float], expected: dict[int, float]) -> None:
    assert drawn(**options) == pytest.approx(expected, abs=0.03)


def test_a_random_start_draws_the_first_token_from_all_alike(toy_run: Run) -> None:
    first = Counter(toy_run.generate(random_start=True, length=1, seed=seed) for seed in range(400))
    known = {"\n" if word == "<eos>" else word for word in toy_run.tokenizer.vocabulary} - {"<unk>"}
    assert set(first) == known
    assert max(first.values()) < 40  # each some ten times
    text = toy_run.generate(random_start=True, length=30, seed=1)
    assert text == toy_run.generate(random_start=True, length=30, seed=1)
    with pytest.raises(UnrolledError, match="exclude each other"):
        toy_run.generate("the", random_start=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"length": -1}, "length"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top-k"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": 1.1}, "top-p"),
    ],
)
def test_options_out_of_bounds_are_named(toy_run: Run, options: dict[str, float], named: str) -> None:
    with pytest.raises(UnrolledError, match=f"{named} must be"):
        toy_run.generate("the", **options)
    with pytest.raises(UnrolledError, match="k must be at least 1, not 0"):
        toy_run.predict("the", k=0)
