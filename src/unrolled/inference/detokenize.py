"""Tokens parted by spaces made text for people: punctuation beside its word, contractions whole, plain quotes."""

import re

_RULES = [
    (r"`` ", r'"'),
    (r" (n't|'(?:s|re|ve|ll|d|m|S|RE|VE|LL|D|M)?)(?=\s|$)", r"\1"),
    (r" ([.,;:?!%)\]}…]+)(?=\s|$)", r"\1"),
    (r"(?<![^\s(\[{\"])([(\[{$£#]) (?=\S)", r"\1"),
    (r" ''(?=\s|$)", r'"'),
    (r"-lrb- ?", "("),
    (r" ?-rrb-", ")"),
]
_COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in _RULES]


def detokenize(text: str) -> str:
    """A text whose tokens are parted by spaces, as the Penn Treebank's are, as one would write it.

    What has no rule stays as it is: `<unk>`, and `N` for a number.
    """
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    return text
