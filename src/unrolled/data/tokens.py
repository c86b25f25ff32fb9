"""Text <-> ids, by word, character, byte or byte-pair encoding; the vocabulary comes from the training text alone.

A tokenizer is what `tokenizer.json` says, which the `tokenizers` library reads by itself. Words, characters and bytes
have a fast twin here that gives the same ids (tests hold them together), at several million words a second:

    word        white space parts words; the end of a line is `<eos>`; words outside the vocabulary are `<unk>`
    character   every character, line ends too; characters outside the vocabulary are `<unk>`
    byte        every byte is its own id, whatever it means
    bpe         byte-pair encoding over bytes (Sennrich et al. 2016), so there is nothing unknown
"""

import codecs
import itertools
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import IO, final

import numpy as np
from tokenizers import Tokenizer as Backend

from unrolled.data.backends import (
    BYTE_OF,
    BYTE_TOKENS,
    LONGEST_BPE_WORD,
    UNKNOWN,
    Unit,
    bpe_backend,
    bpe_pre_tokenizer,
    byte_backend,
    level_backend,
    read_backend,
)
from unrolled.data.reading import Corpus, read_lines, read_text
from unrolled.data.words import END_OF_LINE, Numbering, Words
from unrolled.errors import UnrolledError, did_you_mean
from unrolled.files import written_whole

_MAX_UNICODE = 0x110000


@dataclass(frozen=True)
class Vocabulary:
    """How the vocabulary comes from the training text."""

    unit: Unit = "word"
    size: int = 0
    """The most entries, the commonest kept, `<unk>` and `<eos>` counted; 0 for no limit (BPE: 8,000)."""
    min_count: int = 1
    """Words or characters seen less often become `<unk>`; for BPE, pairs seen less often are not merged."""
    unknown: bool = True
    """Whether there is an `<unk>`; without it, what is not in the vocabulary is an error."""


@final
class Tokenizer:
    """Text to ids and back. Made by `learn` or `Tokenizer.load`; equal files make equal tokenizers.

    Attributes:
        unit: word, character, byte or bpe.
        vocabulary: every token, by id.
        unknown_id: the id of `<unk>`, None where there is none.
        start_id: what stands before the first token of a text: the end of the line before it.
    """

    def __init__(self, backend: Backend, unit: Unit) -> None:
        self.backend = backend
        self.unit: Unit = unit
        self.vocabulary = [token for token, _ in sorted(backend.get_vocab().items(), key=itemgetter(1))]
        self._ids = _Ids((token, number) for number, token in enumerate(self.vocabulary))
        self.unknown_id = self._ids.get(UNKNOWN) if self.unit in ("word", "character") else None
        self._ids.default = self.unknown_id
        line_end = {"word": END_OF_LINE, "character": "\n"}.get(self.unit, BYTE_TOKENS[ord("\n")])
        self.start_id = self._ids.get(line_end, self._ids.get(" ", 0))
        self.dtype = smallest_dtype(len(self.vocabulary))
        self._encode = {
            "word": Words(self._ids.__getitem__),
            "character": self._encode_characters,
            "byte": lambda text: np.frombuffer(text.encode(), np.uint8),
            "bpe": _Pieces(backend, [len(token) for token in self.vocabulary]),
        }[self.unit]
        self._table: np.ndarray | None = None
        self._encoding = threading.Lock()  # what was learnt of words is kept between texts

    def __len__(self) -> int:
        return len(self.vocabulary)

    @property
    def busy(self) -> bool:
        """Whether another thread encodes now, for which `encode` would wait."""
        return self._encoding.locked()

    def encode(self, text: str) -> np.ndarray:
        """The ids (N,) of a text, in the smallest integer type.

        Raises:
            UnrolledError: something is not in the vocabulary, and there is no `<unk>`.
        """
        if not text:  # and for that nobody waits
            return np.zeros(0, self.dtype)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UnrolledError(f"not UTF-8: {text!r}") from error
        with self._encoding:
            return self._encode(text).astype(self.dtype, copy=False)

    def _encode_characters(self, text: str) -> np.ndarray:
        missing = len(self)
        if self._table is None:
            default = missing if self.unknown_id is None else self.unknown_id
            table = np.full(_MAX_UNICODE, default, smallest_dtype(missing + 1))
            for character, number in self._ids.items():
                if character != UNKNOWN:
                    table[ord(character)] = number
            self._table = table  # whole, or not there: whoever interrupts this may encode again
        ids = self._table[_code_points(text)]
        if self.unknown_id is None and len(ids) and ids.max() == missing:
            known = "".join(sorted(character for character in self._ids if len(character) == 1))
            raise UnrolledError(
                f"the character {text[int(ids.argmax())]!r} is not in the model's vocabulary, which has no <unk>: "
                f"{known[:60]}{' and more' * (len(known) > 60)}; one trained with --data.unknown true reads <unk> there"
            )
        return ids

    def pieces(self, text: str) -> list[str]:
        """A text cut where its tokens end, one piece for each: words have the white space before them.

        Bytes make a character in the piece of its last one. What follows the last word is nobody's.
        """
        if self.unit == "word":
            return re.findall(r"[^\S\n]*(?:\n|\S+)", text)
        return list(text) if self.unit == "character" else list(map(self.decoder(), self.encode(text).tolist()))

    def token(self, id: int) -> str:
        """The text of one token: a word, a character, or the bytes of a piece (which may not be whole characters)."""
        if self.unit in ("word", "character"):
            return self.vocabulary[id]
        return self.bytes_of(id).decode(errors="replace")

    def bytes_of(self, id: int) -> bytes:
        """The bytes of one token of bytes or BPE."""
        return bytes(BYTE_OF[character] for character in self.vocabulary[id])

    def id_of(self, word: str) -> int:
        """The id of a word that is one token.

        Raises:
            UnrolledError: it is not in the vocabulary, or several tokens.
        """
        if self.unit in ("word", "character"):
            if word not in self._ids:
                raise UnrolledError(f"{word!r} is not in the model's vocabulary{did_you_mean(word, self.vocabulary)}")
            return self._ids[word]
        encodings = [self.encode(text) for text in (f" {word}", word)]  # pieces nearly always begin with their space
        found = [ids for ids in encodings if len(ids) == 1]
        if not found:
            pieces = " ".join(repr(self.token(int(id))) for id in encodings[0])
            raise UnrolledError(f"{word!r} is not one token but {len(encodings[0])}: {pieces}")
        return int(found[0][0])

    def decoder(self) -> Callable[[int], str]:
        """A function from the next id to the text that it adds; `decode` and streaming are the same.

        Words are parted by spaces, line ends begin a new line. Bytes are held back until they make a character.
        """
        if self.unit == "word":
            return _WordWriter(self.vocabulary)
        if self.unit == "character":
            return self.vocabulary.__getitem__
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda id: utf8.decode(self.bytes_of(id))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids."""
        return "".join(map(self.decoder(), map(int, ids)))

    def characters(self, ids: np.ndarray) -> int:
        """How many characters the ids stand for: a word counts one more for the space or line end after it.

        So `<eos>` itself counts nothing, and `<unk>` as it is spelled. A character cut in two (by bytes or BPE) counts
        where it begins.
        """
        counts = sum_counts(ids, len(self))
        if self.unit == "word":
            lengths = [0 if word == END_OF_LINE else len(word) + 1 for word in self.vocabulary]
        elif self.unit == "character":
            return int(counts.sum())
        else:
            lengths = [sum(byte & 0xC0 != 0x80 for byte in self.bytes_of(id)) for id in range(len(self))]
        return int(counts @ np.array(lengths, dtype=np.int64))

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        return self.backend.to_str()

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Reads a `tokenizer.json`.

        Raises:
            UnrolledError: the file is not one of ours.
        """
        try:
            backend, unit = read_backend(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UnrolledError(f"{path} is missing") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, UnrolledError) as error:
            raise UnrolledError(f"{path} is not a tokenizer of Unrolled: {error}") from error
        return cls(backend, unit)


class _Ids(dict):
    """Tokens to ids; what is missing is the unknown, if there is one."""

    default: int | None = None

    def __missing__(self, word: str) -> int:
        if self.default is None:
            raise UnrolledError(f"the word {word!r} is not in the model's vocabulary")
        return self.default


class _Pieces:
    """Byte-pair encoding that asks the library once for each word with the white space before it.

    The library's own pattern never joins a word to what follows it, so texts may be cut there and new words encoded
    as one text (tests hold it): the bytes of the tokens tell which are whose.
    """

    _MOST = 1 << 24
    """Characters of all words remembered."""

    def __init__(self, backend: Backend, token_bytes: list[int]) -> None:
        self.backend = backend
        self.backend_for_short_words = Backend.from_str(backend.to_str())
        self.backend_for_short_words.pre_tokenizer = bpe_pre_tokenizer(long_words=False)
        self.token_bytes = np.array(token_bytes, np.int64)
        self._forget()

    def _forget(self) -> None:
        self.numbering = Numbering()
        self.words = Words(self.numbering.__getitem__, with_space=True)
        self.characters = 0
        self.ids, self.ends = np.zeros(0, np.uint32), np.zeros(1, np.int64)

    def __call__(self, text: str) -> np.ndarray:
        if self.characters > self._MOST:
            self._forget()
        try:
            numbers = self._numbers(text)
        except BaseException:  # interrupted where a word has its number and not yet its ids
            self._forget()
            raise
        starts, lengths = self.ends[numbers], self.ends[numbers + 1] - self.ends[numbers]
        before = np.cumsum(lengths) - lengths
        return self.ids[np.arange(lengths.sum()) + np.repeat(starts - before, lengths)]

    def _numbers(self, text: str) -> np.ndarray:
        """Of each word, where among `ends` it has its own; new words are encoded."""
        known = len(self.numbering)
        numbers = self.words(text)
        if len(self.numbering) > known:
            fresh = list(itertools.islice(self.numbering, known, None))
            self.characters += sum(map(len, fresh))
            short = max(map(len, fresh)) < LONGEST_BPE_WORD
            backend = self.backend_for_short_words if short else self.backend
            ids = np.array(backend.encode_batch_fast(["".join(fresh)])[0].ids, np.uint32)
            word_stops = np.cumsum([len(word.encode()) for word in fresh])
            ends = np.searchsorted(np.cumsum(self.token_bytes[ids]), word_stops) + 1
            self.ends = np.append(self.ends, self.ends[-1] + ends)
            self.ids = np.append(self.ids, ids)
        return numbers


class _WordWriter:
    """Words with spaces between them, but none at the beginning or end of a line."""

    def __init__(self, vocabulary: list[str]) -> None:
        self.vocabulary = vocabulary
        self.at_line_start = True

    def __call__(self, id: int) -> str:
        word = self.vocabulary[id]
        space = "" if self.at_line_start or word == END_OF_LINE else " "
        self.at_line_start = word == END_OF_LINE
        return "\n" if word == END_OF_LINE else space + word


# ------------------------------------------------------------------------------------------------ learning a vocabulary


def learn(corpus: Corpus, vocabulary: Vocabulary, folder: Path) -> Tokenizer:
    """The tokenizer of a corpus, from its training text alone.

    Words and characters are ordered by falling count, then alphabetically; `<unk>` counts all that it stands for. Where
    the ids of the training text fall out on the way, they are left in `folder`.
    """
    if vocabulary.unit == "byte":
        return Tokenizer(byte_backend(), "byte")
    if vocabulary.unit == "bpe":
        return Tokenizer(bpe_backend(read_lines(corpus, "train"), vocabulary.size, vocabulary.min_count), "bpe")
    if vocabulary.unit == "character":
        counts = _count_characters(read_text(corpus, "train"))
        return Tokenizer(level_backend(_ranked(counts, vocabulary), "character"), "character")
    return _learn_words(corpus, vocabulary, folder)


def _learn_words(corpus: Corpus, vocabulary: Vocabulary, folder: Path) -> Tokenizer:
    """Looks every word up once: numbered as they first appear, counted, ranked; then the numbers become ids."""
    numbering = Numbering()
    words = Words(numbering.__getitem__)
    with tempfile.TemporaryFile(dir=folder) as numbered, written_whole(folder / "train.ids") as file:
        for piece in read_lines(corpus, "train"):
            numbered.write(words(piece).astype(np.uint32).tobytes())
        counts = np.zeros(len(numbering), np.int64)
        for block in _blocks(numbered):
            counts += np.bincount(block, minlength=len(numbering))
        ranked = _ranked(dict(zip(numbering, counts.tolist(), strict=True)), vocabulary)
        tokenizer = Tokenizer(level_backend(ranked, "word"), "word")
        ids = np.fromiter((tokenizer._ids[word] for word in numbering), tokenizer.dtype, len(numbering))
        for block in _blocks(numbered):
            file.write(ids[block].tobytes())
    return tokenizer


def _blocks(numbered: IO[bytes]) -> Iterator[np.ndarray]:
    numbered.seek(0)
    while block := numbered.read(1 << 22):
        yield np.frombuffer(block, np.uint32)


def _count_characters(pieces: Iterable[str]) -> dict[str, int]:
    total = np.zeros(0, np.int64)
    for piece in pieces:
        total = _added(total, np.bincount(_code_points(piece)))
    return {chr(code): int(total[code]) for code in np.flatnonzero(total)}


def _added(total: np.ndarray, more: np.ndarray) -> np.ndarray:
    if len(more) > len(total):
        total = np.pad(total, (0, len(more) - len(total)))
    total[: len(more)] += more
    return total


def _ranked(counts: dict[str, int], vocabulary: Vocabulary) -> list[str]:
    """The vocabulary by falling count, then alphabetically."""

    special = {END_OF_LINE: counts[END_OF_LINE]} if END_OF_LINE in counts else {}
    if vocabulary.unknown:
        special[UNKNOWN] = 0
    common = {word: count for word, count in counts.items() if count >= vocabulary.min_count and word not in special}
    if vocabulary.size:
        words = _by_count(common)[: max(vocabulary.size - len(special), 0)]
        common = {word: common[word] for word in words}
    kept = common | special
    if vocabulary.unknown:
        kept[UNKNOWN] = sum(counts.values()) - sum(kept.values())
    return _by_count(kept)


def _by_count(counts: dict[str, int]) -> list[str]:
    return sorted(sorted(counts), key=counts.__getitem__, reverse=True)  # equal counts stay alphabetical


def _code_points(text: str) -> np.ndarray:
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def shown(token: str) -> str:
    """A token as one can see it: white space and what cannot be printed by its name."""
    return token if token.strip() == token and token.isprintable() and token else repr(token)[1:-1].replace(" ", "␣")


def sum_counts(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id occurs, (V,); in blocks, for `bincount` takes eight bytes an id."""
    counts = np.zeros(vocab_size, np.int64)
    for first in range(0, len(ids), 1 << 20):
        counts += np.bincount(ids[first : first + (1 << 20)], minlength=vocab_size)
    return counts


def smallest_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer type for ids below `vocab_size`."""
    return np.min_scalar_type(max(vocab_size - 1, 0))
