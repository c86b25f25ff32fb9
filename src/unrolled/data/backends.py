"""tokenizer.json: what the `tokenizers` library is told, so that it reads text as we do.

The library panics over some descriptions, so a file is not given to it: the tokenizer is made anew from the file's
vocabulary and merges, and must come out as the file says.
"""

import json
import re
from collections.abc import Iterable
from typing import Any, Literal

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from unrolled.data.words import END_OF_LINE
from unrolled.errors import UnrolledError

Unit = Literal["word", "character", "byte", "bpe"]
UNKNOWN = "<unk>"
DEFAULT_BPE_SIZE = 8_000
LONGEST_BPE_WORD = 256
"""Characters; the library takes more than quadratic time over a word, and a text may have no spaces at all."""
_AROUND_THE_MODEL = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens")


def read_backend(content: str) -> tuple[Backend, Unit]:
    """The tokenizer of a `tokenizer.json`, and of what unit it is.

    Raises:
        UnrolledError, ValueError, LookupError, TypeError, AttributeError, RecursionError: it is none of ours.
    """
    description = json.loads(content)
    unit = _unit_of(description)
    backend = _rebuilt(description["model"], unit)
    ours = json.loads(backend.to_str())
    if any(description.get(part) != ours.get(part) for part in _AROUND_THE_MODEL):
        raise UnrolledError(f"it is not as this package makes those of {unit}s")
    return backend, unit


def level_backend(vocabulary: list[str], unit: Unit) -> Backend:
    """Words or characters, each its place in the vocabulary."""
    ids = {token: number for number, token in enumerate(vocabulary)}
    unknown = {"unk_token": UNKNOWN} if UNKNOWN in ids else {}
    backend = Backend(models.WordLevel(ids, **unknown))
    if unit == "word":
        separators = normalizers.Replace(Regex("[\\x1c-\\x1f]"), " ")  # white space to Python, not to the library
        line_ends = normalizers.Replace("\n", f" {END_OF_LINE} ")
        backend.normalizer = normalizers.Sequence([separators, line_ends])
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
        backend.decoder = decoders.Fuse()
    return backend


def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_TOKENS = _byte_characters()
BYTE_OF = {character: byte for byte, character in enumerate(BYTE_TOKENS)}


def byte_backend() -> Backend:
    """Every byte its own id."""
    backend = Backend(models.BPE({token: byte for byte, token in enumerate(BYTE_TOKENS)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def bpe_backend(lines: Iterable[str], size: int, min_count: int) -> Backend:
    """Learns the merges of a text; size 0 for the usual one."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = bpe_pre_tokenizer(long_words=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(size or DEFAULT_BPE_SIZE, 256),
        min_frequency=min_count,
        initial_alphabet=BYTE_TOKENS,
        show_progress=False,
    )
    backend.train_from_iterator(map(_with_long_runs_cut, lines), trainer)  # faster than by the library
    backend.pre_tokenizer = bpe_pre_tokenizer(long_words=True)
    return backend


def _with_long_runs_cut(text: str) -> str:
    """Words and white space in parts of a bounded length, for the library learns in quadratic time over either."""
    text = _LONG_SPACE.sub("\\g<0>\n", text)
    if max(map(len, text.split()), default=0) < LONGEST_BPE_WORD:
        return text
    return re.sub(rf"\S{{{LONGEST_BPE_WORD}}}", "\\g<0>\n", text)


_LONG_SPACE = re.compile(rf"[^\S\n]{{{LONGEST_BPE_WORD}}}")


def bpe_pre_tokenizer(long_words: bool) -> pre_tokenizers.PreTokenizer:
    """GPT-2's pattern within lines, so that lines may be encoded one by one; long words cut, or none expected."""
    cuts = ["\n", rf"\S{{{LONGEST_BPE_WORD}}}"][: 1 + long_words]
    splits = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _rebuilt(model: dict[str, Any], unit: Unit) -> Backend:
    """The tokenizer that we make with the vocabulary of a file's model; the library itself panics over some of them.

    Raises:
        UnrolledError, LookupError, TypeError, ValueError: it has none, or one with gaps.
    """
    for token in model["vocab"]:
        token.encode()  # no half characters
    vocabulary = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if not vocabulary or [model["vocab"][token] for token in vocabulary] != list(range(len(vocabulary))):
        raise UnrolledError("its ids are not 0, 1, 2, …")
    if unit == "byte" and vocabulary == BYTE_TOKENS:
        return byte_backend()
    if unit == "byte":
        raise UnrolledError("its tokens are not the bytes")
    if unit != "bpe":
        if unit == "character" and any(len(token) != 1 for token in vocabulary if token != UNKNOWN):
            raise UnrolledError("its characters are longer than one")
        return level_backend(vocabulary, unit)
    if not set(BYTE_TOKENS) <= set(vocabulary) or not all(set(token) <= BYTE_OF.keys() for token in vocabulary):
        raise UnrolledError("its pieces are not of bytes")
    merges = [(left, right) for left, right in model["merges"]]
    if not all({left, right, left + right} <= model["vocab"].keys() for left, right in merges):
        raise UnrolledError("it merges what is not in its vocabulary")
    backend = Backend(models.BPE(model["vocab"], merges))
    backend.pre_tokenizer = bpe_pre_tokenizer(long_words=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def _unit_of(description: dict[str, Any]) -> Unit:
    model = description["model"]
    if model["type"] == "WordLevel":
        return "word" if description["pre_tokenizer"]["type"] == "WhitespaceSplit" else "character"
    if model["type"] == "BPE":
        return "byte" if description["pre_tokenizer"]["type"] == "ByteLevel" else "bpe"
    raise UnrolledError(f"a tokenizer of type {model['type']}")
