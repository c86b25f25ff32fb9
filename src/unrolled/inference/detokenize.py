"""Tokens parted by spaces made text for people: punctuation beside its word, contractions whole, plain quotes."""

import re
from typing import final

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


@final
class Detokenizer:
    """`detokenize` of a text that comes in pieces, line by line: all but the last token, which may change yet."""

    _LONGEST_LINE = 10_000

    def __init__(self) -> None:
        self._line, self._given = "", ""

    def add(self, piece: str) -> str:
        """What is certain now."""
        *lines, self._line = (self._line + piece).split("\n")
        given = "".join(self._give(detokenize(line)) + self._end("\n") for line in lines)
        head = self._line[: _LAST_TOKEN.search(self._line).start()]  # type: ignore[union-attr]
        given += self._give(detokenize(f"{head} {_NEXT}").removesuffix(_NEXT).removesuffix(" "))
        if len(self._line) > self._LONGEST_LINE:
            given += self.rest()
        return given

    def rest(self) -> str:
        """What was held back, at the end."""
        given, self._line = self._give(detokenize(self._line)), ""
        return given + self._end("")

    def _give(self, text: str) -> str:
        """What of a line's beginning was not given before."""
        new, self._given = text[len(self._given) :], text
        return new

    def _end(self, end: str) -> str:
        self._given = ""
        return end


_LAST_TOKEN, _NEXT = re.compile(r"\s*\S*$"), "\0"
