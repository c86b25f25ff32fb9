"""The text of a split, piece by piece: bytes of a plain file -> str, with an error that names file, line and byte.

Whatever a corpus came from, its splits are ranges of bytes of plain files, so nothing here grows with the corpus.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from unrolled.errors import UnrolledError

_PIECE = 1 << 18
"""Bytes read at a time: the words of a piece stay in the processor's cache."""
_LONGEST_WORD = 1 << 20
_WIDE_SPACES = tuple(
    space.encode()
    for space in "\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
)
_PLAIN_SPACES = (b" ", b"\n", b"\r", b"\t", b"\v", b"\f")
_SPACES = {*_PLAIN_SPACES, *_WIDE_SPACES}


@dataclass(frozen=True)
class Split:
    """The bytes `start` to `stop` of a file, their SHA-256, and what the user calls the file."""

    name: str
    path: Path
    start: int
    stop: int
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """The text of some splits. `note` says how it was split, where that was done here; `encoding` None means bytes."""

    name: str
    splits: dict[str, Split]
    note: str = ""
    encoding: str | None = "utf-8"


def read_text(corpus: Corpus, split: str) -> Iterator[str]:
    """The text of a split in pieces, each from the white space before a word on, so that neither is cut.

    Line ends become "\\n" whether they were "\\r\\n", "\\r" or "\\n"; a byte order mark is left out.

    Raises:
        UnrolledError: bytes that are not UTF-8, or NUL; the message names file, line and byte.
    """
    part = _without_mark(corpus.splits[split])
    held = b""  # the beginning of a word that goes on in the next piece
    for raw, position in _raw(part):
        piece = held + raw
        start = position - len(held)
        last = position + len(raw) == part.stop
        end = len(piece) if last else _last_word_end(piece)
        if end == 0 and len(piece) > _LONGEST_WORD:
            end = _whole_characters(piece)
        piece, held = piece[:end], piece[end:]
        yield _decoded(corpus, part, piece, start)


def read_lines(corpus: Corpus, split: str) -> Iterator[str]:
    """The text of a split in pieces, a last line without its line end given one."""
    last = "\n"
    for piece in read_text(corpus, split):
        yield piece
        last = piece[-1:] or last
    if last != "\n":
        yield "\n"


def read_bytes(corpus: Corpus, split: str) -> Iterator[bytes]:
    """The bytes of a split as they are, in pieces."""
    for raw, _ in _raw(corpus.splits[split]):
        yield raw


def _without_mark(part: Split) -> Split:
    """The split without the byte order mark that its file may begin with."""
    with part.path.open("rb") as file:
        marked = part.start == 0 and file.read(3) == codecs.BOM_UTF8
    return replace(part, start=3) if marked else part


def _raw(part: Split) -> Iterator[tuple[bytes, int]]:
    with part.path.open("rb") as file:
        file.seek(part.start)
        position = part.start
        while raw := file.read(min(_PIECE, part.stop - position)):
            yield raw, position
            position += len(raw)


def _last_word_end(piece: bytes) -> int:
    """Where the white space before the last word begins."""
    words = _without_space(piece)
    end = len(_without_space(words[: max(words.rfind(space) for space in _PLAIN_SPACES) + 1]))
    if not end:  # to look for all the others takes longer
        after = max((place + len(space) for space in _WIDE_SPACES if (place := words.rfind(space)) >= 0), default=0)
        end = len(_without_space(words[:after]))
    return end


def _without_space(piece: bytes) -> bytes:
    """`piece` without the white space that it ends in, beyond ASCII too."""
    end = len(piece.rstrip())
    while end and (length := next((n for n in (1, 2, 3) if piece[max(end - n, 0) : end] in _SPACES), 0)):
        end -= length
    return piece[:end]


def _whole_characters(piece: bytes) -> int:
    """The length of the part of `piece` that does not cut a character, nor a CR from its LF."""
    end = len(piece) - 1
    while end > len(piece) - 4 and piece[end] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if piece[end - 1 : end + 1] == b"\r\n" else end


def _decoded(corpus: Corpus, part: Split, piece: bytes, start: int) -> str:
    try:
        text = piece.decode()
        nul = piece.find(b"\0")
        if nul >= 0:
            utf16 = "pass --encoding utf-16 if it is that, or " if corpus.encoding == "utf-8" else "pass "
            raise UnrolledError(
                f"{_place(part, start + nul)}: a NUL, so this is no plain text; {utf16}--data.tokens byte"
            )
    except UnicodeDecodeError as error:
        place = _place(part, start + error.start)
        byte = piece[error.start]
        raise UnrolledError(f"{place}: not UTF-8 (0x{byte:02x}); convert the file or pass --encoding") from error
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text


def _place(part: Split, position: int) -> str:
    """Where a byte lies, as a person counts: line and byte from 1."""
    line, line_start = 1, 0
    with part.path.open("rb") as file:
        offset = 0
        while block := file.read(min(1 << 20, position - offset)):
            line += block.count(b"\n")
            if b"\n" in block:
                line_start = offset + block.rindex(b"\n") + 1
            offset += len(block)
    return f"{part.name}, line {line}, byte {position - line_start + 1}"
