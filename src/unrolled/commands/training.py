"""The command that makes a model: train.

Imported only when it is asked for: its options are a recipe's fields, and to know those takes half of the time of help.
"""

import signal
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

import unrolled
from unrolled.answers import notice, print_epoch, print_json, print_results
from unrolled.commands.kinds import Json, Text
from unrolled.errors import UnrolledError
from unrolled.options import RecipeOptions


def train(
    recipe: str | None = None,
    /,
    *,
    data: Text | None = None,
    out: Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    json: Json = False,
    options: Annotated[RecipeOptions, Parameter(name="*")] = RecipeOptions(),  # noqa: B008
) -> int:
    """Train a model and leave a run folder; its help is `cli.TRAIN`.

    Parameters
    ----------
    recipe
        A shipped recipe (unrolled recipes lists them) or a TOML file; demo when left out.
    data
        A corpus by name, a text file, a folder or archive with train, valid and test, or - for standard input.
    out
        The run folder; runs/RECIPE-N when left out.
    resume
        Go on with the run folder of --out, or with the newest of this recipe.
    quiet
        No progress.
    """
    from unrolled.progress import Display
    from unrolled.training.distributed import launched_rank

    rank = launched_rank()
    reports = not rank
    if rank is not None:  # torchrun ends all when one has ended; what there is to say is said first
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    changes = {name.replace("__", "."): value for name, value in vars(options).items()}
    changes = {name: value for name, value in changes.items() if value is not None}
    with Display(quiet=quiet or not reports, on_epoch=print_epoch if json else None) as display:
        try:
            run = unrolled.train(recipe, data=data, out=out, resume=resume, changes=changes, progress=display)
        except UnrolledError as error:
            if reports:
                raise
            raise UnrolledError(f"process {rank}: {error}") from error
    stopped = run.manifest["status"] == "stopped"
    if not reports:
        return 130 * stopped
    if stopped:
        how = "unrolled train" if rank is None else "torchrun … -m unrolled train"
        notice(f"stopped after step {run.manifest['steps']:,}; go on with: {how} --resume --out {run.path}")
        return 130
    if json:
        print_json({"run": str(run.path), **run.manifest["results"]})
    else:
        print_results(run)
    return 0
