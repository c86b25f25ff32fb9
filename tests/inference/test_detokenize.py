"""Text for people."""

import pytest
from hypothesis import given
from hypothesis.strategies import lists, sampled_from

from unrolled.inference.detokenize import Detokenizer, detokenize

SPECIAL = [
    "he",
    "does",
    "n't",
    "say",
    ",",
    "'s",
    "``",
    "''",
    "(",
    ")",
    "$",
    "N",
    "%",
    "-lrb-",
    "-rrb-",
    "the",
    "<unk>",
    "u.s.",
]
TOKENS = sampled_from([*SPECIAL, "\n"])


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("he does n't say , i 'm told , what it 's worth .", "he doesn't say, i'm told, what it's worth."),
        ("`` it costs $ N ( or less ) , '' she said", '"it costs $N (or less)," she said'),
        ("the banks ' rates rose N % ; why ?", "the banks' rates rose N%; why?"),
        ("an <unk> of mr. <unk>", "an <unk> of mr. <unk>"),
        ("two lines .\nthe second .", "two lines.\nthe second."),
        ("", ""),
    ],
)
def test_tokens_become_text(tokens: str, text: str) -> None:
    assert detokenize(tokens) == text


@given(tokens=lists(TOKENS, max_size=30))
def test_a_text_in_pieces_is_the_text(tokens: list[str]) -> None:
    joiner, text = Detokenizer(), "".join(f" {token} the" for token in tokens).replace(" \n ", "\n")
    pieces = [joiner.add(text[first : first + 3]) for first in range(0, len(text), 3)]
    lines = "\n".join(map(detokenize, text.split("\n")))
    assert "".join(pieces) + joiner.rest() == lines
