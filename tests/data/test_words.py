"""The remembering table against asking for every word, over texts of every kind and a table too small for them."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unrolled.data import words as module
from unrolled.data.words import Numbering, Words, ask_each, split_with_space, split_words

WORDS = st.text("ab\n\t é\u3000漢\x1f\v", max_size=12) | st.text("ab", min_size=14, max_size=18) | st.text(max_size=6)


@pytest.mark.parametrize("with_space", [False, True])
@pytest.mark.parametrize("slots", [1, 20])
@given(st.lists(st.lists(WORDS, max_size=30).map(" ".join), min_size=1, max_size=4))
def test_numbers_are_those_of_every_word_asked_for(with_space: bool, slots: int, texts: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FEW", 1)
        patch.setattr(module, "_SLOTS", slots)
        fast, plain = Numbering(), Numbering()
        words = Words(fast.__getitem__, with_space)
        split = split_with_space if with_space else split_words
        for text in texts:
            np.testing.assert_array_equal(words(text), ask_each(split(text), plain.__getitem__))
        assert list(fast) == list(plain)


def test_a_remembered_word_is_not_asked_for_again() -> None:
    asked = []

    def number_of(word: str) -> int:
        asked.append(word)
        return len(word)

    text = "a short text with\n" * 1_000
    words = Words(number_of)
    first = words(text)
    asked.clear()
    np.testing.assert_array_equal(words(text), first)
    assert asked == []


def test_words_that_differ_in_one_byte_or_in_length_are_told_apart() -> None:
    base = "abcdefghijklmno"
    texts = [base[:length] for length in range(1, 16)] + [base[:i] + "z" + base[i + 1 :] for i in range(15)]
    texts += [base + end for end in "pq"] + [base + "\0", "a\0", "a\0\0"]
    numbering = Numbering()
    words = Words(numbering.__getitem__)
    for _ in range(2):
        numbers = words(" ".join(texts * 200))
        assert numbers[: len(texts)].tolist() == list(range(len(texts)))
    assert list(islice(numbering, len(texts))) == texts
