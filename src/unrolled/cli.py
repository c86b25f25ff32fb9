"""The command line: every command by name, and what becomes of a mistake. Answers go to standard output, progress and
notices to standard error.

Nothing heavier than the command line's own library is imported until a command runs.
"""

import os
import sys
from typing import NoReturn

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

import unrolled
from unrolled.answers import fail
from unrolled.commands import looking, measuring, using
from unrolled.errors import UnrolledError

NO_NEGATIVES = Parameter(negative=())
TRAIN = """Train a model and leave a run folder.

What an option does not say, the recipe says; the values in brackets are those of the recipe demo."""
app = App(
    name="unrolled",
    help="Recurrent language models that anyone can train, trust and use on an ordinary computer.",
    version=unrolled.__version__,
    default_parameter=NO_NEGATIVES,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)
data_app = App(
    name="data", help="The corpora: what there is, where it is, how to get it.", default_parameter=NO_NEGATIVES
)
kernels_app = App(
    name="kernels",
    help="The native kernels: faster training and answers, compiled once.",
    default_parameter=NO_NEGATIVES,
)
app.command(data_app)
app.command(kernels_app)
app.command("unrolled.commands.training:train", name="train", help=TRAIN)
for command in (measuring.evaluate, measuring.bench, using.score, using.predict, using.generate, using.serve):
    app.command(command)
for command in (
    looking.inspect,
    looking.embeddings,
    looking.report,
    looking.export,
    looking.repair,
    looking.recipes,
):
    app.command(command)
for name, command in (
    ("list", looking.data_list),
    ("fetch", looking.data_fetch),
    ("import", looking.data_import),
    ("show", looking.data_show),
):
    data_app.command(command, name=name)
for name, command in (("build", measuring.kernels_build), ("status", measuring.kernels_status)):
    kernels_app.command(command, name=name)


_WHERE_TEXT_GOES = {"predict": "; a text goes in quotes", "generate": "; a text goes after --prompt, in quotes"}


def main(arguments: list[str] | None = None) -> NoReturn:
    """The command `unrolled`. A user's mistake is one line on standard error and exit status 2."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # a terminal that cannot show a character shows its number
            stream.reconfigure(errors="backslashreplace")
    try:
        status = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except UnusedCliTokensError as error:
        hint = _WHERE_TEXT_GOES.get(next(iter(error.command_chain or ()), ""), "")
        fail("too many arguments: " + " ".join(error.unused_tokens or []) + hint)
    except CycloptsError as error:
        asked = sys.argv[1:] if arguments is None else arguments
        taken_for_option = asked[:1] == ["predict"] and any(text[:1] == "-" and " " in text for text in asked)
        fail(f"{error}" + "; a text that begins with a hyphen goes after --" * taken_for_option)
    except UnrolledError as error:
        fail(str(error))
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        fail(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Exception as error:  # a fault of ours: one line all the same
        if os.environ.get("UNROLLED_TRACEBACK"):
            raise
        fail(f"internal error, please report it: {error!r} (UNROLLED_TRACEBACK=1 shows where)", 1)
    sys.exit(status or 0)
