"""Speed beside PyTorch's own layers: the same recipe, text and machine, in alternating rounds of one run.

What is reported of a subject is the median over the rounds, and of its ratio to the baseline the median of the rounds'
ratios.
"""

import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch

from unrolled import __version__
from unrolled.errors import UnrolledError
from unrolled.folder import hardware
from unrolled.kernels.build import in_use
from unrolled.recipe import load_recipe
from unrolled.subjects import (
    BASELINE,
    DTYPES,
    PRODUCTS,
    SCORED_STREAMS,
    SUBJECTS,
    Case,
    Work,
    case,
    fastest_precision,
    peer,
    refuse_incomparable,
    usual_subjects,
)
from unrolled.threads import others_run

TASKS = {"train": "tokens/s", "score": "tokens/s", "next-word": "µs"}
_START_S = 5  # of a subject, about
_PATIENCE_S = 900
_CEILING, _CEILING_SIZE = "ceiling", 2048
_CEILING_FLOP = 2.0 * _CEILING_SIZE**3


def bench(
    recipe: str = "ptb-small",
    tasks: tuple[str, ...] = ("train", "score", "next-word"),
    subjects: tuple[str, ...] = (),
    rounds: int = 5,
    seconds: float = 2.0,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """Times the subjects at a recipe's tasks, one round of all after another.

    Args:
        recipe: a shipped name or a file.
        tasks: of `TASKS`.
        subjects: of `SUBJECTS`, or other programs as NAME=COMMAND; the baseline is always among them. Where none of
            `SUBJECTS` is named, all of them that are of use on this processor.
        rounds: how often each is timed.
        seconds: how long a round of one takes, about.
        progress: told of each task before it begins, and of others who use the processor.

    Yields:
        For each task and subject {"subject", "recipe", "task", "median", "minimum", "maximum", "unit",
        "ratio_to_baseline", "ratio_minimum", "ratio_maximum", "share_of_ceiling", "ceiling_gflop_per_second",
        "peak_memory_mib"}; a ratio is above 1 for what is faster. The ceiling is the speed of PyTorch's own square
        products in this run, in bf16 where the processor multiplies it and else in f32.

    Raises:
        UnrolledError: there is no such recipe, task or subject, nothing to time, or no way to compare the recipe.
    """
    if all("=" in name for name in subjects):
        subjects = (*usual_subjects(), *subjects)
    for name, known in ((tasks, TASKS), (subjects, SUBJECTS)):
        for unknown in (one for one in name if one not in known and not ("=" in one and known is SUBJECTS)):
            raise UnrolledError(
                f"no {'task' if known is TASKS else 'subject'} {unknown!r}; there are " + ", ".join(known)
            )
    for name in (one for one in subjects if "=" in one):
        if not all(part.strip() for part in name.split("=", 1)) or name.partition("=")[0] in SUBJECTS:
            raise UnrolledError(f"{name!r} is no other program: it takes NAME=COMMAND, and a name of its own")
    if rounds < 1 or not 0 < seconds < math.inf:
        raise UnrolledError(f"a benchmark takes one round or more and some seconds, not {rounds} and {seconds:g}")
    training = refuse_incomparable(load_recipe(recipe)).training
    timed = case(recipe)
    flop = timed.flop_per_token
    progress(f"{recipe} on {timed.text}")
    if others_run():
        progress("another program is using the processor; what is measured beside it is not worth much")
    for task in tasks:
        tokens = {"train": training.batch_size, "score": SCORED_STREAMS, "next-word": 1}[task]
        tokens *= 1 if task == "next-word" else training.num_steps
        names = list(
            dict.fromkeys((BASELINE, *(name for name in subjects if task == "train" or not _only_trains(name))))
        )
        speeds: dict[str, list[float]] = {name: [] for name in (*names, _CEILING)}
        takes = len(speeds) * (rounds * seconds + _START_S)
        progress(f"{recipe}, {task}: {len(names)} subjects, rounds: {rounds}; some {takes:,.0f} seconds")
        with ExitStack() as stack:
            workers = {name: stack.enter_context(_Worker(recipe, task, name, seconds)) for name in speeds}
            for _ in range(rounds):
                for name, worker in workers.items():
                    speeds[name].append(tokens / worker.seconds_a_step())
            memory = {name: worker.peak_memory_mib() for name, worker in workers.items()}
        possible = statistics.median(speeds[_CEILING]) / tokens * _CEILING_FLOP
        for name in names:
            values = speeds[name]
            shown = [1e6 / value for value in values] if task == "next-word" else values
            ratios = [a / b for a, b in zip(values, speeds[BASELINE], strict=True)]
            yield {
                "subject": name.partition("=")[0],
                "recipe": recipe,
                "task": task,
                "median": statistics.median(shown),
                "minimum": min(shown),
                "maximum": max(shown),
                "unit": TASKS[task],
                "ratio_to_baseline": statistics.median(ratios),
                "ratio_minimum": min(ratios),
                "ratio_maximum": max(ratios),
                "share_of_ceiling": statistics.median(values) * flop / possible if task == "train" else None,
                "ceiling_gflop_per_second": possible / 1e9,
                "peak_memory_mib": memory[name],
            }


def machine() -> dict[str, Any]:
    """Where it is measured: the processor, its cores and threads, the versions, the kernels."""
    versions = {"unrolled": __version__, "torch": torch.__version__, "kernels": in_use()}
    return hardware(torch.device("cpu")) | versions


class _Worker:
    """A subject in a process of its own, where no other's memory or threads are in its way; it waits between rounds."""

    def __init__(self, recipe: str, task: str, subject: str, seconds: float) -> None:
        self.subject, context = subject, multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, recipe, task, subject, seconds), daemon=True)

    def __enter__(self) -> Self:
        self.process.start()
        self._ask("ready")
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.join()

    def seconds_a_step(self) -> float:
        """How long a step took in one more round."""
        return self._ask("work")

    def peak_memory_mib(self) -> float | None:
        """The most memory that the process held, from its beginning; unknown of another program."""
        return self._ask("memory")

    def _ask(self, what: str) -> Any:
        try:
            self.connection.send(what)
            if not self.connection.poll(_PATIENCE_S):
                raise UnrolledError(f"{self.subject} has not answered for {_PATIENCE_S} seconds")
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise UnrolledError(f"{self.subject}: its process was ended") from error
        if isinstance(answer, UnrolledError):
            raise answer
        return answer


def _serve(connection: Connection, recipe: str, task: str, subject: str, seconds: float) -> None:
    """Makes the work ready and warm, then does a round of it whenever asked."""
    connection.recv()
    try:
        work = _ceiling if subject == _CEILING else _subject(subject, task, case(recipe))
        work(3)
        count = max(1, math.ceil(seconds / _seconds_a_step(work, 3)))
        connection.send(None)
        while True:
            if connection.recv() == "work":
                connection.send(_seconds_a_step(work, count))
            else:
                connection.send(None if "=" in subject else peak_memory_mib())
    except UnrolledError as error:
        connection.send(error)
    except Exception as error:  # of a subject: torch.compile without a compiler, say
        connection.send(UnrolledError(f"{subject}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"))


def peak_memory_mib() -> float:
    """The most memory that this process has held."""
    if (status := Path("/proc/self/status")).exists():  # on Linux what getrusage tells begins with the parent's
        return int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) / 2**10
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def _only_trains(subject: str) -> bool:
    return "=" in subject or subject == PRODUCTS


def _subject(name: str, task: str, case: Case) -> Work:
    known, _, command = name.partition("=")
    return peer(command, case) if command else SUBJECTS[known](task, case)


def _ceiling(count: int) -> None:
    """Square products by PyTorch: what the processor can be had to do."""
    a, b = (torch.ones(_CEILING_SIZE, _CEILING_SIZE, dtype=DTYPES[fastest_precision()]) for _ in range(2))
    for _ in range(count):
        a @ b


def _seconds_a_step(work: Work, count: int) -> float:
    begun = time.perf_counter()
    work(count)
    return (time.perf_counter() - begun) / count
