"""What comes next, and more of it."""

import math
from collections import Counter
from typing import Any

import pytest
import torch

from unrolled import Run, UnrolledError
from unrolled.inference.generate import prefix_ids, read_prefix
from unrolled.inference.sampling import Sampling


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
    log_probs, _ = read_prefix(toy_run.model, prefix_ids(toy_run.tokenizer, "the dog"))
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


def drawn(**options: Any) -> dict[int, float]:
    source, sampling = torch.Generator().manual_seed(0), Sampling(**options)
    counts = Counter(sampling.draw(PROBABILITIES.log(), source) for _ in range(4_000))
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
        ({"min_p": 0.6}, {1: 4 / 7, 3: 3 / 7}),
        ({"min_p": 1.0}, {1: 1.0}),
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
        ({"min_p": -0.1}, "min-p"),
        ({"repetition_penalty": 0.5}, "repetition-penalty"),
    ],
)
def test_options_out_of_bounds_are_named(toy_run: Run, options: dict[str, float], named: str) -> None:
    with pytest.raises(UnrolledError, match=f"{named} must be"):
        toy_run.generate("the", **options)
    with pytest.raises(UnrolledError, match="k must be at least 1, not 0"):
        toy_run.predict("the", k=0)


def test_what_has_come_before_is_less_likely_with_a_penalty(toy_run: Run) -> None:
    source, before = torch.Generator().manual_seed(0), torch.tensor([False, True, False, False])
    assert Sampling(temperature=0).draw(PROBABILITIES.log(), source, before) == 1
    assert Sampling(temperature=0, repetition_penalty=2.0).draw(PROBABILITIES.log(), source, before) == 3
    plain = toy_run.generate("the dog", length=60, seed=1).split()
    varied = toy_run.generate("the dog", length=60, seed=1, repetition_penalty=5.0).split()
    assert len(set(varied)) > len(set(plain))


def test_banned_tokens_are_never_drawn(toy_run: Run) -> None:
    text = toy_run.generate(length=300, seed=1)
    assert "the" in text.split()
    assert "the" not in toy_run.generate(length=300, seed=1, banned=("the",)).split()
    with pytest.raises(UnrolledError, match="'zebra' is not in the model's vocabulary"):
        toy_run.generate(banned=("zebra",))
    with pytest.raises(UnrolledError, match="nothing can be drawn"):
        toy_run.generate(banned=tuple(toy_run.tokenizer.vocabulary))


def test_the_text_ends_before_a_stop(toy_run: Run, character_run: Run) -> None:
    text = toy_run.generate("the dog", length=100, seed=3)
    line = text.partition("\n")[0]
    assert toy_run.generate("the dog", length=100, seed=3, stop=("\n",)) == line
    letters = character_run.generate("the ", length=200, seed=3)
    cut = letters[50:56]
    expected = letters[: letters.index(cut)]
    assert character_run.generate("the ", length=200, seed=3, stop=("\x00", cut)) == expected
    assert "".join(character_run.stream("the ", length=200, seed=3, stop=(cut,))) == expected
    assert character_run.generate("the ", length=40, seed=3, stop=(letters[38:60],)) == letters[:40]


def test_samples_are_drawn_side_by_side(toy_run: Run) -> None:
    texts = toy_run.generate_many("the dog", 5, length=40, seed=2)
    assert len(texts) == len(set(texts)) == 5
    assert texts == toy_run.generate_many("the dog", 5, length=40, seed=2)
    assert toy_run.generate_many("the dog", 1, length=40, seed=2) == [toy_run.generate("the dog", length=40, seed=2)]
    greedy = toy_run.generate("the dog", length=40, temperature=0.0)
    assert toy_run.generate_many("the dog", 3, length=40, temperature=0.0) == [greedy] * 3
    stopped = toy_run.generate_many("the dog", 5, length=40, seed=2, stop=("\n",))
    assert stopped == [text.partition("\n")[0] for text in texts]
    assert toy_run.generate_many("the dog", 3, length=0) == [""] * 3
    with pytest.raises(UnrolledError, match="samples must be from 1 to"):
        toy_run.generate_many("the dog", 0)


def test_many_prefixes_at_once_are_each_as_by_itself(toy_run: Run) -> None:
    prefixes = ["", "the", "the old dog that sees the cats", "birds " * 300, "the dog walks\nthe"] * 20
    for found, prefix in zip(toy_run.predict_many(prefixes, 5), prefixes, strict=True):
        alone = toy_run.predict(prefix, 5)
        assert [word for word, _ in found.words] == [word for word, _ in alone.words]
        assert [value for _, value in found.words] == pytest.approx([value for _, value in alone.words], abs=1e-4)
    log_probs, _ = read_prefix(toy_run.model, prefix_ids(toy_run.tokenizer, prefixes[2]))
    assert toy_run.predict(prefixes[2], 1).words[0][1] == pytest.approx(log_probs.max().exp().item(), abs=1e-4)


def test_a_word_being_typed_is_completed(toy_run: Run, character_run: Run) -> None:
    found = toy_run.predict("the d", k=40, complete=True).words
    assert found
    assert all(word.startswith("d") for word, _ in found)
    assert sum(value for _, value in found) == pytest.approx(1)
    likeliest = dict(toy_run.predict("the", k=40).words)
    assert found[0][1] / found[1][1] == pytest.approx(likeliest[found[0][0]] / likeliest[found[1][0]], rel=1e-3)
    assert toy_run.predict("the ", complete=True).words == toy_run.predict("the").words
    assert toy_run.predict("the qqq", complete=True).words == []
    with pytest.raises(UnrolledError, match="only a model of words completes them"):
        character_run.predict("the d", complete=True)


def test_a_wide_beam_finds_the_likeliest_continuations(toy_run: Run) -> None:
    pairs = []
    for word, value in toy_run.predict("the", k=100).words:
        pairs += [(f" {word} {after}", value * p) for after, p in toy_run.predict(f"the {word}", k=100).words]
    pairs = [(text.replace(" <eos>", "\n"), value) for text, value in pairs]
    expected = sorted((value for text, value in pairs), reverse=True)[:5]
    found = toy_run.continuations("the", length=2, k=5, width=100)
    assert [math.exp(value) for _, value in found] == pytest.approx(expected, rel=1e-3)
    before = toy_run.score("the", end=False).log_prob
    for length in (2, 3, 4):
        for text, value in toy_run.continuations("the", length=length, k=20, width=40):
            assert toy_run.score(f"the{text}", end=False).log_prob - before == pytest.approx(value, abs=1e-3)
    assert found[0][0].startswith(" ")
    with pytest.raises(UnrolledError, match="k must be from 1 to 2, not 5"):
        toy_run.continuations("the", k=5, width=2)
