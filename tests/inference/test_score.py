"""How probable a text is."""

import math

import numpy as np
import pytest

from unrolled import Run, UnrolledError
from unrolled.data.embedded import toy_text
from unrolled.inference.evaluate import evaluate_exact


def test_a_score_is_the_sum_of_its_tokens_and_agrees_with_evaluate(toy_run: Run) -> None:
    text = "the old dog walks\nbirds sing here"
    result = toy_run.score(text)
    ids = np.concatenate([[toy_run.tokenizer.start_id], toy_run.tokenizer.encode(text + "\n")])
    assert result.tokens == len(ids) - 1
    assert result.log_prob == pytest.approx(-evaluate_exact(toy_run.model, ids).nll_nats, rel=1e-6)
    assert [token for token, _ in result.per_token][-1] == "<eos>"
    assert result.perplexity == pytest.approx(math.exp(-result.log_prob / result.tokens))


def test_a_score_is_what_prediction_said(toy_run: Run) -> None:
    per_token = toy_run.score("the dog walks").per_token
    predicted = dict(toy_run.predict("the dog", 38).words)
    assert per_token[2] == ("walks", pytest.approx(math.log(predicted["walks"]), abs=1e-4))


def test_a_sentence_of_the_language_is_likelier_than_one_that_is_not(toy_run: Run) -> None:
    assert toy_run.score("the dog walks here").log_prob > toy_run.score("the dog walk here").log_prob + 2


def test_unknown_words_are_counted(toy_run: Run) -> None:
    assert toy_run.score("the zebra that sees the okapi walks").unknown == 2


def test_an_empty_text_is_the_end_of_its_line(toy_run: Run) -> None:
    assert toy_run.score("").tokens == 1


def test_a_long_text_is_scored_whole(toy_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    text = toy_text("valid")[:20_000]
    whole = toy_run.score(text).log_prob
    monkeypatch.setattr("unrolled.inference.score._LOGITS_AT_ONCE", 500)
    assert toy_run.score(text).log_prob == pytest.approx(whole, rel=1e-6)


def test_characters_outside_the_vocabulary_are_named(character_run: Run) -> None:
    with pytest.raises(UnrolledError, match="the character 'Q' is not in the model's vocabulary"):
        character_run.score("the Queen")
