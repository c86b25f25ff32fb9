"""What the commands read and print: lines of text, tables, JSON, notices. Answers go to standard output."""

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from unrolled.errors import UnrolledError

if TYPE_CHECKING:
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
    rows += [["test", name, "", figure(results[f"{name}_test_perplexity"], 2), ""] for name in yardsticks]
    print_table(["split", "protocol", "tokens", "perplexity", "bits per character"], rows)
    train_perplexity = figure(results["train_perplexity"], 2)
    print(
        f"best epoch {results['best_epoch']}, its train perplexity as it ran {train_perplexity}; run folder {run.path}"
    )


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
    console.print(table)


def print_json(answer: dict[str, Any]) -> None:
    """One object as one line; what is not finite is null."""
    from unrolled.metrics import finite

    print(json.dumps(finite(answer), ensure_ascii=False, allow_nan=False), flush=True)


def notice(text: str) -> None:
    """One line on standard error."""
    print(f"unrolled: {text}", file=sys.stderr)


def fail(text: str, status: int = 2) -> NoReturn:
    """One line on standard error, and the end."""
    notice(" ".join(text.split()))
    sys.exit(status)
