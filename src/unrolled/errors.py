"""The one exception a user's mistake raises: a single line that names the thing and the way out."""

import difflib
from collections.abc import Iterable


class UnrolledError(ValueError):
    """Bad input, said in one line. The command prints it and exits with status 2."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'ptb-small'?"`, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
