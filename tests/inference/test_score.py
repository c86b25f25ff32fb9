"""How probable a text is."""

import math

import numpy as np
import pytest

from unrolled import Run, UnrolledError
from unrolled.data.embedded import toy_text
from unrolled.inference.evaluate import evaluate_exact
from unrolled.inference.score import Score


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
    monkeypatch.setattr("unrolled.inference.reading._FIGURES_AT_ONCE", 500)
    assert toy_run.score(text).log_prob == pytest.approx(whole, rel=1e-6)


def test_many_at_a_time_are_each_as_by_itself(toy_run: Run) -> None:
    lines = [*toy_text("valid").splitlines()[:150], "", "the zebra", "the " * 300]
    for score, line in zip(toy_run.score_many(lines), lines, strict=True):
        alone = toy_run.score(line)
        assert isinstance(score, Score)
        assert [token for token, _ in score.per_token] == [token for token, _ in alone.per_token]
        for (_, one), (_, other) in zip(score.per_token, alone.per_token, strict=True):
            assert one == pytest.approx(other, abs=1e-4)


def test_a_document_is_scored_as_evaluate_does(toy_run: Run) -> None:
    text = toy_text("test")
    scorer = toy_run.scorer(begin=False)
    scores = [scorer.score_next(line) for line in text.splitlines()]
    expected = toy_run.evaluate("test")
    assert sum(score.tokens for score in scores) == expected["tokens"]
    assert -sum(score.log_prob for score in scores) == pytest.approx(expected["nll_nats"], rel=1e-6)


@pytest.mark.parametrize("end", [True, False])
def test_a_line_with_its_end_has_no_second_one(toy_run: Run, end: bool) -> None:
    lines = toy_text("test").splitlines(keepends=True)[:9]
    one, other = toy_run.scorer(begin=False, end=end), toy_run.scorer(begin=False)
    for line in lines:
        assert one.score_next(line).per_token == other.score_next(line.removesuffix("\n")).per_token


@pytest.mark.parametrize("line_end", ["\r\n", "\r"])
def test_lines_end_as_in_the_text_that_a_model_was_trained_on(toy_run: Run, character_run: Run, line_end: str) -> None:
    for run, word, unknown in ((toy_run, "zoo", "spell"), (character_run, "cat", "count")):
        expected = run.score(f"the dog\nthe {word}\n", unknown=unknown)
        found = run.score(f"the dog{line_end}the {word}{line_end}", unknown=unknown)
        assert found.per_token == expected.per_token


def test_a_line_that_cannot_be_scored_leaves_the_document_as_it_was(character_run: Run) -> None:
    one, other = character_run.scorer(), character_run.scorer()
    one.score_next("the dog")
    with pytest.raises(UnrolledError, match="'Q' is not in"):
        one.score_next("the Queen")
    other.score_next("the dog")
    assert one.score_next("walks").log_prob == other.score_next("walks").log_prob


def test_without_begin_or_end_these_are_not_counted(toy_run: Run) -> None:
    whole = toy_run.score("the dog walks").per_token
    assert toy_run.score("the dog walks", end=False).per_token == [
        (token, pytest.approx(value)) for token, value in whole[:-1]
    ]
    without = toy_run.score("the dog walks", begin=False).per_token
    assert [token for token, _ in without] == ["dog", "walks", "<eos>"]
    assert toy_run.score("", begin=False, end=False).tokens == 0
    scorer = toy_run.scorer(end=False)
    assert [token for token, _ in scorer.score_next("the dog").per_token] == ["the", "dog"]
    assert [token for token, _ in scorer.score_next("walks").per_token] == ["walks"]


@pytest.mark.parametrize("begin", [True, False])
def test_what_unknown_words_are_worth(toy_run: Run, begin: bool) -> None:
    text = "the zebra that sees the okapi walks"
    counted, skipped, spelled = (toy_run.score(text, unknown=u, begin=begin) for u in ("count", "skip", "spell"))
    unknown = math.fsum(value for token, value in counted.per_token if token == "<unk>")
    assert skipped.log_prob == pytest.approx(counted.log_prob - unknown)
    assert (skipped.tokens, skipped.unknown, spelled.unknown) == (counted.tokens - 2, 2, 2)
    letters = len(set("".join(token for token in toy_run.tokenizer.vocabulary if not token.startswith("<"))))
    assert spelled.log_prob == pytest.approx(
        counted.log_prob - (len("zebra") + len("okapi") + 2) * math.log(letters + 1)
    )


def test_characters_outside_the_vocabulary_are_named(character_run: Run) -> None:
    with pytest.raises(UnrolledError, match="the character 'Q' is not in the model's vocabulary"):
        character_run.score("the Queen")
