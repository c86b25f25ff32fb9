"""Texts to be scored, as they come: lines, objects in JSON, n-best lists; and their scores in the same order."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from unrolled.errors import UnrolledError

if TYPE_CHECKING:
    from unrolled.inference.score import Score, Scorer


_MOST_WRONG = 10
_LONGEST = 64 << 20  # bytes of a line


@dataclass(frozen=True)
class Item:
    """A text to be scored, with the id that goes back, and for an n-best list its score elsewhere; or what is wrong."""

    id: Any
    text: str
    other: float = 0.0
    error: str | None = None


def read_items(file: str, read: Callable[[int, str], Item]) -> Iterator[list[Item]]:
    """What `read(number, line)` makes of the lines of a file or of standard input, as many at a time as have come.

    What cannot be read stands in its place as an error.
    """
    if file == "-" and sys.stdin is None:
        raise UnrolledError("standard input is closed")
    line, number = _Line(), 0
    if file != "-" and not os.path.exists(file):
        raise UnrolledError(f"no file {file!r}; for a text itself: echo '…' | unrolled score RUN")
    with sys.stdin.buffer if file == "-" else open(file, "rb") as stream:
        while True:
            block = os.read(stream.fileno(), 1 << 16)
            *ends, begin = block.split(b"\n")
            lines = [line.ended(end) for end in ends]
            line.add(begin)
            if not block and line.size:
                lines = [line.ended(b"")]
            if lines:
                yield [_read(read, number + place, whole) for place, whole in enumerate(lines, start=1)]
            number += len(lines)
            if not block:
                return


class _Line:
    """A line that comes in parts, of which no more is held than tells that it is too long."""

    def __init__(self) -> None:
        self.parts, self.size = list[bytes](), 0

    def add(self, part: bytes) -> None:
        if self.size <= _LONGEST:
            self.parts.append(part)
            self.size += len(part)

    def ended(self, part: bytes) -> bytes:
        self.add(part)
        whole = b"".join(self.parts)
        self.parts, self.size = [], 0
        return whole


def _read(read: Callable[[int, str], Item], number: int, line: bytes) -> Item:
    if len(line) > _LONGEST:
        return Item(number, line[:100].decode(errors="replace"), error=f"a line of more than {_LONGEST >> 20} MiB")
    text = line.decode(errors="replace")
    try:
        return read(number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r"))
    except UnicodeDecodeError as error:
        wrong = f"not UTF-8 at byte {error.start + 1}; convert it first (iconv -f latin1 -t utf-8)"
        return Item(number, text, error=wrong)
    except UnrolledError as error:
        return Item(number, text, error=str(error))


def plain_item(number: int, line: str) -> Item:
    """A line is a text, and its number the id."""
    return Item(number, line)


def json_item(text_field: str, id_field: str, score_field: str | None) -> Callable[[int, str], Item]:
    """A line is an object in JSON, with a text, an id (its number where there is none) and perhaps a score to read."""

    def read(number: int, line: str) -> Item:
        try:
            object = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UnrolledError("not JSON") from error
        if not isinstance(object, dict):
            raise UnrolledError("no object in JSON")
        id, text = object.get(id_field, number), object.get(text_field)
        other = object.get(score_field, 0.0) if score_field is not None else 0.0
        id = id if isinstance(id, str | int | float) else json.dumps(id)
        if not isinstance(text, str):
            return Item(id, line, error=f"no text {text_field!r}")
        if not isinstance(other, int | float) or isinstance(other, bool) or not abs(other) <= sys.float_info.max:
            return Item(id, text, error=f"{score_field!r} is no finite number")
        return Item(id, text, float(other))

    return read


def nbest_item(number: int, line: str) -> Item:
    """A line is an utterance's id, a score and a hypothesis, parted by tabs."""
    parts = line.split("\t", 2)
    try:
        id, other, text = parts
        if not math.isfinite(float(other)):
            raise ValueError(other)
    except ValueError as error:
        raise UnrolledError("not an id, a finite score and a text, parted by tabs") from error
    return Item(id, text, float(other))


@final
class Scored:
    """Items with their scores, in their order; how many were seen, and how many could not be scored.

    Args:
        scorer: what scores them.
        batches: items, as many at a time as have come.
        carry: each goes on from the one before it.
    """

    def __init__(self, scorer: "Scorer", batches: Iterable[list[Item]], carry: bool) -> None:
        self.scorer, self.batches, self.carry = scorer, batches, carry
        self.seen = self.failed = 0
        self.wrong: list[str] = []

    def __iter__(self) -> Iterator[tuple[Item, "Score | UnrolledError"]]:
        for batch in self.batches:
            whole = [item for item in batch if item.error is None]
            results = map(self._next, whole) if self.carry else iter(self.scorer.score_many([i.text for i in whole]))
            for item in batch:
                result = next(results) if item.error is None else UnrolledError(item.error)
                self.seen += 1
                self.failed += isinstance(result, UnrolledError)
                yield item, result

    def scores(self) -> Iterator[tuple[Item, "Score"]]:
        """Those that could be scored; what was wrong with the first few others is in `wrong`."""
        for item, result in self:
            if not isinstance(result, UnrolledError):
                yield item, result
            elif len(self.wrong) < _MOST_WRONG:
                named = "" if item.id == self.seen else f", id {item.id}"
                self.wrong.append(f"line {self.seen}{named}: {result}")

    def _next(self, item: Item) -> "Score | UnrolledError":
        try:
            return self.scorer.score_next(item.text)
        except UnrolledError as error:
            return error
