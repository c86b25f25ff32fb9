"""Text -> words -> numbers, at more than ten million words a second on one core.

Whatever a word's number means (its id, its place in a table), asking for it one word at a time is what takes the time.
`Words` remembers the answers under the word's own bytes, in arrays, and asks only for what it has forgotten; `ask_each`
is its plain twin.
"""

import re
from collections.abc import Callable, Iterable

import numpy as np

END_OF_LINE = "<eos>"

NumberOf = Callable[[str], int]
_OTHER, _SPACE, _LINE_END = 0, 1, 2
_WIDE_SPACE = "\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_WITH_SPACE = re.compile("[{0}]*[^{0}]+|[{0}]+".format("\t-\r " + _WIDE_SPACE))
_SLOTS = 20  # as a power of two: a million
_LONGEST = 15  # bytes of a word: with its length it makes two numbers of 64 bits
_FEW = 4_096  # characters, below which arrays do not pay


class Numbering(dict[str, int]):
    """Words numbered in the order of their first appearance."""

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        return number


def split_words(text: str) -> list[str]:
    """The words between white space, `<eos>` for each end of a line."""
    return text.replace("\n", f" {END_OF_LINE} ").split()


def split_with_space(text: str) -> list[str]:
    """Each word with the white space before it, so that together they are the text."""
    return _WITH_SPACE.findall(text)


def ask_each(words: Iterable[str], number_of: NumberOf) -> np.ndarray:
    """The number of every word, (N,)."""
    return np.fromiter(map(number_of, words), np.int64)


class Words:
    """The numbers (N,) of the words of a text, as `ask_each(split(text), number_of)` gives them.

    A table with one slot for a word's hash: a word that finds another there is asked for again and takes its place.
    The two keys of a word are its bytes and its length, so no two words are taken for one another.

    Args:
        number_of: called with a word that is not remembered; must always answer the same.
        with_space: words as of `split_with_space`, else of `split_words`.
    """

    def __init__(self, number_of: NumberOf, with_space: bool = False) -> None:
        self.number_of = number_of
        self.with_space = with_space
        self.split = split_with_space if with_space else split_words
        space = "\t\n\v\f\r " if with_space else "\t\v\f\r \x1c\x1d\x1e\x1f"
        kinds = np.full(256, _OTHER, np.uint8)
        kinds[[ord(character) for character in space]] = _SPACE
        kinds[ord("\n")] = _SPACE if with_space else _LINE_END
        self.kinds = kinds.tobytes()
        self.keys = np.zeros((2, 1 << _SLOTS), np.uint64)
        self.numbers = np.zeros(1 << _SLOTS, np.int64)

    def __call__(self, text: str) -> np.ndarray:
        if len(text) < _FEW or (not text.isascii() and re.search(f"[{_WIDE_SPACE}]", text)):
            return ask_each(self.split(text), self.number_of)
        raw = text.encode()
        starts, stops = self._bounds(np.frombuffer(raw.translate(self.kinds), np.uint8))
        low, high = _keys(raw, starts, stops)
        slots = ((low ^ high * _MIX[0]) * _MIX[1] >> np.uint64(64 - _SLOTS)).astype(np.intp)
        numbers = self.numbers[slots]
        known = (self.keys[0][slots] == low) & (self.keys[1][slots] == high) & (high > 0)
        if not known.all():
            asked = np.flatnonzero(~known)
            spans = zip(starts[asked].tolist(), stops[asked].tolist(), strict=True)
            words = [raw[start:stop].decode() for start, stop in spans]
            if not self.with_space:
                words = [END_OF_LINE if word == "\n" else word for word in words]
            numbers[asked] = ask_each(words, self.number_of)
            taken = slots[asked]
            self.keys[0][taken], self.keys[1][taken], self.numbers[taken] = low[asked], high[asked], numbers[asked]
        return numbers

    def _bounds(self, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the words start and stop, each (N,), from the kind of every byte."""
        inside = np.zeros(len(kinds) + 2, bool)
        inside[1:-1] = kinds == _OTHER
        stop = inside[1:-1] & ~inside[2:]
        if self.with_space:
            stop[-1] = True
            stops = np.flatnonzero(stop) + 1
            return np.append(0, stops[:-1]), stops
        start = inside[1:-1] & ~inside[:-2]
        line_end = kinds == _LINE_END
        return np.flatnonzero(start | line_end), np.flatnonzero(stop | line_end) + 1


_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)  # odd numbers that spread the bits upwards
_LENGTHS = np.arange(_LONGEST + 2)
_LOW = np.array([256 ** min(n, 8) - 1 for n in _LENGTHS.tolist()], np.uint64)
_HIGH = np.array([256 ** max(n - 8, 0) - 1 for n in _LENGTHS.tolist()[:-1]] + [0], np.uint64)
_LENGTH = np.array([n << 56 for n in _LENGTHS.tolist()[:-1]] + [0], np.uint64)


def _keys(raw: bytes, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first eight bytes of each word; its other seven with its length on top, 0 for a longer word."""
    eight = np.ndarray(len(raw) + 8, "<u8", raw + bytes(16), strides=(1,))  # at every byte, it and the seven after it
    lengths = np.minimum(stops - starts, _LONGEST + 1)
    return eight[starts] & _LOW[lengths], eight[starts + 8] & _HIGH[lengths] | _LENGTH[lengths]
