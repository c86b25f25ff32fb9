"""The kinds of options that several commands share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, Token

Text = Annotated[str, Parameter(allow_leading_hyphen=True)]  # "-" is standard input
RunFolder = Annotated[Path, Parameter(help="A run folder.", show_default=False)]
Json = Annotated[bool, Parameter(help="Answer in JSON, one object a line.")]


def _whole(kind: object, tokens: Sequence[Token]) -> int:
    """A whole number as it is written; `int` of the command line's library would take 1.5 for 1."""
    return int(tokens[0].value)


Whole = Annotated[int, Parameter(converter=_whole)]
Device = Annotated[str, Parameter(help="cpu, cuda, cuda:1; auto takes a GPU where there is one.")]
Precision = Annotated[
    Literal["f32", "bf16"], Parameter(help="Of products; bf16 is less exact, and faster where the processor has it.")
]
