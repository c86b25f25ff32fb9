"""The corpora that need no file."""

import math
from collections import Counter

import pytest

from unrolled.data import embedded
from unrolled.data.embedded import GRAMMAR, stdlib_text, toy_entropy_rate, toy_text


def test_the_grammars_probabilities_sum_to_one() -> None:
    for rule in GRAMMAR.values():
        assert math.isclose(sum(probability for probability, _ in rule), 1)


def test_entropy_rate_of_a_grammar_small_enough_to_enumerate(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = {
        "SENTENCE": [(0.25, ["a"]), (0.75, ["b", "REST"])],
        "REST": [(0.5, []), (0.5, ["c"])],
    }
    sentences = {"a": 0.25, "b": 0.375, "b c": 0.375}
    monkeypatch.setattr(embedded, "GRAMMAR", grammar)
    entropy = -sum(p * math.log(p) for p in sentences.values())
    mean_tokens = sum(p * (len(s.split()) + 1) for s, p in sentences.items())
    assert math.isclose(toy_entropy_rate(), entropy / mean_tokens)


def test_entropy_rate_is_that_of_the_sentences_drawn() -> None:
    """No code that encodes sentences one by one can beat their entropy; the draws' own frequencies come near it."""
    lines = (toy_text("train") + toy_text("test")).splitlines()
    short = [line for line in lines if len(line.split()) <= 3]  # few enough kinds for their frequencies to be known
    counts = Counter(short)
    assert len(counts) < 300
    share = counts["the dog walks"] / len(lines)
    expected = 0.5 * (0.7 * 0.75 * 0.2 * 0.75) * 0.2 * 0.6
    assert abs(share - expected) < 4 * math.sqrt(expected / len(lines))
    tokens = sum(len(line.split()) + 1 for line in lines)
    assert abs(tokens / len(lines) - _mean_tokens()) < 0.05


def _mean_tokens() -> float:
    lengths = dict.fromkeys(GRAMMAR, 0.0)
    for _ in range(200):
        lengths = {
            symbol: sum(p * sum(lengths.get(part, 1.0) for part in parts) for p, parts in rule)
            for symbol, rule in GRAMMAR.items()
        }
    return lengths["SENTENCE"] + 1


def test_toy_agrees_in_number_however_far_apart() -> None:
    one, many = {"walks", "sleeps", "sings", "runs", "waits"}, {"walk", "sleep", "sing", "run", "wait"}
    for line in toy_text("valid").splitlines():
        words = [word for word in line.split() if word not in ("here", "there", "outside")]
        subject = next(
            word for word in words if any(word in (n, n + "s") for n in ("dog", "cat", "girl", "boy", "bird"))
        )
        assert words[-1] in (many if subject.endswith("s") else one), line


def test_toy_is_the_same_everywhere() -> None:
    assert toy_text("test").splitlines()[0] == toy_text("test").splitlines()[0]
    assert len({toy_text(split) for split in ("train", "valid", "test")}) == 3


def test_stdlib_is_real_english_in_three_splits() -> None:
    texts = stdlib_text()
    words = {split: len(text.split()) for split, text in texts.items()}
    assert words["train"] > 200_000
    assert min(words["valid"], words["test"]) > 8_000
    assert texts["train"].split().count("the") > 10_000
    assert texts == stdlib_text()
