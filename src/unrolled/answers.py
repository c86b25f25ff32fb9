"""What the commands read and print: lines of text, tables, JSON, notices. Answers go to standard output."""

import json
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from unrolled.errors import UnrolledError

if TYPE_CHECKING:
    from unrolled.data.tokens import Tokenizer
    from unrolled.inference.score import Score
    from unrolled.items import Item
    from unrolled.run import Run


def read_lines(file: str) -> Iterator[str]:
    """The lines of a UTF-8 file or of standard input, as they come."""
    if file == "-" and sys.stdin is None:
        raise UnrolledError("standard input is closed")
    with sys.stdin.buffer if file == "-" else open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                place = "standard input" if file == "-" else file
                here = f"{place}, line {number}, byte {error.start + 1}"
                raise UnrolledError(f"{here}: not UTF-8; convert it first (iconv -f latin1 -t utf-8)") from error


def utf8(text: str) -> str:
    """An argument as it is, refused where the shell gave bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnrolledError(f"{text!r} is not UTF-8") from error
    return text


def visible(text: str) -> str:
    """A text in one line: its line ends are shown."""
    return text.replace("\n", "⏎")


def notice_unknown(tokenizer: "Tokenizer", text: str) -> None:
    """Says on standard error which words of a text the model reads as `<unk>`."""
    from unrolled.errors import did_you_mean

    if tokenizer.unknown_id is None:
        return
    ids, pieces = tokenizer.encode(text), tokenizer.pieces(text)
    unknown = list(
        dict.fromkeys(piece.strip() for piece, id in zip(pieces, ids, strict=True) if id == tokenizer.unknown_id)
    )
    unknown = [word for word in unknown if word != "<unk>"]
    if unknown:
        named = ", ".join(map(repr, unknown[:5])) + ", …" * (len(unknown) > 5)
        lower = unknown[0].lower()
        hint = (
            f"; did you mean {lower!r}?"
            if lower in tokenizer.vocabulary
            else did_you_mean(unknown[0], tokenizer.vocabulary)
        )
        notice(f"not in the vocabulary, so read as <unk>: {named}{hint}")


def figure(value: float | None, digits: int) -> str:
    """A number with so many digits, or a dash for none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def print_epoch(event: dict[str, Any]) -> None:
    """The end of an epoch as `train --json` says it."""
    names = ("epoch", "train_perplexity", "valid_perplexity", "valid_protocol", "learning_rate")
    print_json({name: event[name] for name in (*names, "tokens_per_second", "elapsed_s")})


def print_results(run: "Run") -> None:
    """What a finished run came to, beside its yardsticks."""
    results = run.manifest["results"]
    rows = []
    for split in ("valid", "test"):
        result = results[split]
        figures = figure(result["perplexity"], 2), figure(result["bits_per_character"], 3)
        rows.append([split, result["protocol"], f"{result['tokens']:,}", *figures])
        if "teacher_forced" in result:
            forced = result["teacher_forced"]
            figures = figure(forced["perplexity"], 2), figure(forced["bits_per_character"], 3)
            rows[-1][1] += ", own output"
            rows.append([split, result["protocol"] + ", teacher-forced", f"{result['tokens']:,}", *figures])
    if results["valid_protocol"] == "paper":
        named = "paper" + ", teacher-forced" * ("teacher_forced" in results["valid"])
        rows.insert(0, ["valid", named, "", figure(results["valid_perplexity"], 2), ""])
    yardsticks = [name for name in ("trigram", "bigram", "unigram", "uniform") if f"{name}_test_perplexity" in results]
    for name in yardsticks:
        counted = ", one added to each count" * name.endswith("gram")
        rows.append(["test", name + counted, "", figure(results[f"{name}_test_perplexity"], 2), ""])
    print_table(["split", "protocol", "tokens", "perplexity", "bits per character"], rows)
    train_perplexity = figure(results["train_perplexity"], 2)
    print(
        f"best epoch {results['best_epoch']}, its train perplexity as it ran {train_perplexity}; run folder {run.path}"
    )


class ScorePrinter:
    """What `score` answers: a row for each text, or an object in JSON.

    Args:
        per_token: every token, too.
        base: of the logarithms: e, 2 or 10.
        json: objects, not rows.
        ids: texts came with ids; else they go by their lines.
    """

    def __init__(self, per_token: bool, base: str, json: bool, ids: bool) -> None:
        self.per_token, self.json, self.ids = per_token, json, ids
        self.nats = {"e": 1.0, "2": math.log(2), "10": math.log(10)}[base]
        self.headed = False

    def line(self, item: "Item", result: "Score | UnrolledError") -> None:
        """A text's score, or why it has none."""
        if isinstance(result, UnrolledError):
            if self.json:
                print_json({"id": item.id, "error": str(result)})
            else:
                self._row("–", "–", "–", "–", f"[{result}] {item.text}")
            return
        if self.json:
            print_json({"id": item.id} | self._answer(result))
        else:
            self._score(result, result.text)

    def hypothesis(self, id: Any, total: float, other: float, result: "Score") -> None:
        """One of an n-best list."""
        if self.json:
            print_json({"id": id, "total": total, "score": other, "text": result.text} | self._answer(result))
        else:
            print(f"{id}\t{total:.4f}\t{result.text}", flush=True)
            self._tokens(result)

    def anomaly(self, id: Any, result: "Score", words: list[tuple[str, float]]) -> None:
        """An odd line with its oddest tokens."""
        from unrolled.data.tokens import shown

        if self.json:
            odd = [{"token": token, "log_prob": value / self.nats} for token, value in words]
            print_json({"id": id, "text": result.text, "oddest": odd} | self._answer(result))
            return
        named = ", ".join(f"{shown(token)} {-value / math.log(2):.1f}" for token, value in words)
        bits = -result.log_prob / result.tokens / math.log(2)
        place = f"id {id}" if self.ids else f"line {id}"
        print(f"{bits:8.2f} bits a token  {place}: {result.text}\n{'':10}oddest: {named}", flush=True)
        self._tokens(result)

    def _answer(self, result: "Score") -> dict[str, Any]:
        answer: dict[str, Any] = {
            "log_prob": result.log_prob / self.nats,
            "tokens": result.tokens,
            "unknown": result.unknown,
            "perplexity": result.perplexity,
        }
        if self.per_token:
            answer["per_token"] = [
                {"token": token, "log_prob": value / self.nats, "surprisal_bits": -value / math.log(2)}
                for token, value in result.per_token
            ]
        return answer

    def _score(self, result: "Score", text: str) -> None:
        worth = "" if result.perplexity is None else f"{result.perplexity:.2f}"
        self._row(f"{result.log_prob / self.nats:.4f}", str(result.tokens), str(result.unknown), worth, text)
        self._tokens(result)

    def _tokens(self, result: "Score") -> None:
        from unrolled.data.tokens import shown

        for token, value in result.per_token if self.per_token else ():
            print(f"{value / self.nats:12.4f} {-value / math.log(2):8.2f} bits   {shown(token)}")

    def _row(self, log_prob: str, tokens: str, unknown: str, perplexity: str, text: str) -> None:
        if not self.headed:
            print(f"{'log_prob':>12} {'tokens':>6} {'<unk>':>6} {'perplexity':>12}  text")
            self.headed = True
        print(f"{log_prob:>12} {tokens:>6} {unknown:>6} {perplexity:>12}  {text}", flush=True)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Rows under a header; without one where all its names are empty."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text as Cell

    table = Table(box=box.SIMPLE_HEAD if any(header) else None, show_header=any(header), pad_edge=False)
    for name in header:
        table.add_column(Cell(name))
    for row in rows:
        table.add_row(*map(Cell, row))
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else 200
    with console.capture() as drawn:
        console.print(table)
    print(*(line.rstrip(" ") for line in drawn.get().removesuffix("\n").split("\n")), sep="\n")


def print_json(answer: dict[str, Any]) -> None:
    """One object as one line; what is not finite is null."""
    from unrolled.metrics import finite

    encoding = (sys.stdout.encoding or "utf-8").lower().replace("_", "-")
    as_it_is = encoding == "utf-8"  # elsewhere what is not ASCII as JSON spells it
    print(json.dumps(finite(answer), ensure_ascii=not as_it_is, allow_nan=False), flush=True)


def notice(text: str) -> None:
    """One line on standard error."""
    print(f"unrolled: {text}", file=sys.stderr)


def fail(text: str, status: int = 2) -> NoReturn:
    """One line on standard error, and the end."""
    notice(" ".join(text.split()))
    sys.exit(status)
