"""The corpora that need no file."""

import hashlib
import math
import random

import pytest

from unrolled.data import embedded
from unrolled.data.embedded import GRAMMAR, stdlib_text, toy_entropy_rate, toy_text

HASHES = {"train": "28153f80b0dd4b65", "valid": "365804b2ff34d7df", "test": "2b520839092ab7c5"}


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
    """The mean of -log p over sentences drawn here, whose choices are counted as they are made."""
    draw = random.Random(7)

    def sentence(symbol: str) -> tuple[float, int]:
        if symbol not in GRAMMAR:
            return 0.0, 1
        probability, parts = draw.choices(GRAMMAR[symbol], [p for p, _ in GRAMMAR[symbol]])[0]
        nats, words = -math.log(probability), 0
        for part_nats, part_words in map(sentence, parts):
            nats, words = nats + part_nats, words + part_words
        return nats, words

    drawn = [sentence("SENTENCE") for _ in range(40_000)]
    rate = sum(nats for nats, _ in drawn) / sum(words + 1 for _, words in drawn)
    assert rate == pytest.approx(toy_entropy_rate(), rel=0.005)


def test_toy_agrees_in_number_however_far_apart() -> None:
    one, many = {"walks", "sleeps", "sings", "runs", "waits"}, {"walk", "sleep", "sing", "run", "wait"}
    for line in toy_text("valid").splitlines():
        words = [word for word in line.split() if word not in ("here", "there", "outside")]
        subject = next(
            word for word in words if any(word in (n, n + "s") for n in ("dog", "cat", "girl", "boy", "bird"))
        )
        assert words[-1] in (many if subject.endswith("s") else one), line


def test_toy_is_the_same_everywhere() -> None:
    hashes = {split: hashlib.sha256(toy_text(split).encode()).hexdigest()[:16] for split in ("train", "valid", "test")}
    assert hashes == HASHES


def test_stdlib_is_real_english_in_three_splits() -> None:
    texts = stdlib_text()
    words = {split: len(text.split()) for split, text in texts.items()}
    assert words["train"] > 200_000
    assert min(words["valid"], words["test"]) > 8_000
    assert texts["train"].split().count("the") > 10_000
    assert texts == stdlib_text()
