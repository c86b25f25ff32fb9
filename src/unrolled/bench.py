"""Speed beside PyTorch's own layers: the same recipe, text and machine, in alternating rounds of one run.

Every subject is a function that makes the work ready and returns `work(count)`, which does so many steps of it. What is
reported of a subject is the median over the rounds, and of its ratio to the baseline the median of the rounds' ratios.

A subject may also be a program, NAME=COMMAND, such as benchmarks/peers/jax_lm.py in an environment of its own. It is
given the work as JSON {"recipe", "ids" (a .npy file), "vocab_size"}, and answers every count on its standard input with
a line when it has taken so many training steps.
"""

import json
import math
import multiprocessing
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unrolled.data.batches import Windows
from unrolled.data.dataset import prepare
from unrolled.data.text import open_corpus, text_is_there
from unrolled.data.tokens import Vocabulary
from unrolled.errors import UnrolledError
from unrolled.kernels import build
from unrolled.nn.loss import token_nll
from unrolled.nn.stream import Stream
from unrolled.recipe import Recipe, load_recipe
from unrolled.run import build_model
from unrolled.training.loop import run_epoch
from unrolled.training.optim import make_optimizer
from unrolled.training.resume import Position

Work = Callable[[int], None]

BASELINE, PRODUCTS = "torch f32", "products alone, torch bf16"
TASKS = {"train": "tokens/s", "score": "tokens/s", "next-word": "µs"}
SCORED_STREAMS = 64
_CEILING, _CEILING_SIZE = "ceiling", 2048
_CEILING_FLOP = 2.0 * _CEILING_SIZE**3


@dataclass(frozen=True)
class Case:
    """What is to be done: a recipe, and ids (N,) of so many kinds."""

    recipe: Recipe
    ids: np.ndarray
    vocab_size: int
    text: str

    def windows(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows without end."""
        while True:
            yield from Windows(self.ids, batch_size, self.recipe.training.num_steps)

    @property
    def flop_per_token(self) -> float:
        """Of training, in the products alone: two for each weight forward, four backward."""
        model = build_model(self.recipe.model, self.vocab_size)
        one_hot = self.recipe.model.embedding_size == 0
        weights = sum(cell.weight_hh.numel() for cell in model.layers)
        weights += sum(cell.weight_ih.numel() for cell in model.layers[one_hot:])
        return 6.0 * (weights + self.vocab_size * model.layers[-1].hidden_size)


def case(name: str) -> Case:
    """A recipe with its own text where that is here, else with ids drawn as Zipf has them."""
    recipe = load_recipe(name)
    data = recipe.data
    if text_is_there(data.corpus):
        dataset = prepare(
            open_corpus(data.corpus), Vocabulary(data.tokens, data.vocab_size, data.min_count, data.unknown)
        )
        return Case(recipe, dataset.ids["train"], len(dataset.tokenizer), dataset.name)
    size = 27 if data.tokens == "character" else data.vocab_size
    shares = 1 / np.arange(1, size + 1)
    ids = np.random.default_rng(1).choice(size, 1_000_000, p=shares / shares.sum())
    return Case(recipe, ids, size, "random ids")


# ------------------------------------------------------------------------------------------------ ours


def ours(task: str, case: Case, precision: str, kernels: bool = True) -> Work:
    """This package, as its commands run it."""
    switch = nullcontext if kernels else build.switched_off
    with switch():
        work = {"train": _our_training, "score": _our_scoring, "next-word": _our_next_word}[task](case, precision)

    def switched(count: int) -> None:
        with switch():
            work(count)

    return switched


def _our_training(case: Case, precision: str) -> Work:
    training = case.recipe.changed({"training.precision": precision}).training
    model = build_model(case.recipe.model, case.vocab_size)
    optimizer = make_optimizer(model, training)
    windows = Windows(case.ids, training.batch_size, training.num_steps)
    position, states = Position(), model.initial_state(training.batch_size)

    def work(count: int) -> None:
        nonlocal states
        if len(windows) - position.window < count:
            position.window = 0
        last = position.step + count
        states = run_epoch(
            model, optimizer, windows, states, training, position, lambda states, figures: position.step < last
        )

    return work


def _our_scoring(case: Case, precision: str) -> Work:
    model = build_model(case.recipe.model, case.vocab_size).eval()
    windows, states = case.windows(SCORED_STREAMS), model.initial_state(SCORED_STREAMS)

    @torch.inference_mode()
    def work(count: int) -> None:
        nonlocal states
        for _ in range(count):
            inputs, targets = next(windows)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                outputs, states = model.hidden(inputs, states)
                token_nll(outputs, model.decoder, targets).sum().item()

    return work


def _our_next_word(case: Case, precision: str) -> Work:
    model = build_model(case.recipe.model, case.vocab_size).eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        stream = Stream(model, model.initial_state(1))
    ids = torch.from_numpy(case.ids[:4096].astype(np.int64))

    def work(count: int) -> None:
        for number in range(count):
            stream.likeliest(ids[number % 4096 : number % 4096 + 1], 10)

    return work


# ------------------------------------------------------------------------------------------------ PyTorch's own layers


class _Plain(nn.Module):
    """The recipe's network as a PyTorch user writes it, on nn.LSTM, nn.GRU or nn.RNN."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        model = case.recipe.model
        size = model.embedding_size or case.vocab_size
        self.embedding = nn.Embedding(case.vocab_size, size) if model.embedding_size else None
        layer = {"lstm": nn.LSTM, "gru": nn.GRU, "elman": nn.RNN}[model.cell]
        sizes = [size, *model.hidden_sizes]
        options = {"nonlinearity": model.activation} if model.cell == "elman" else {}
        self.layers = nn.ModuleList(layer(e, h, **options) for e, h in pairwise(sizes))
        self.dropout = nn.Dropout(model.dropout)
        self.decoder = nn.Linear(sizes[-1], case.vocab_size)
        self.vocab_size = case.vocab_size
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -model.init_scale, model.init_scale)

    def forward(self, inputs: Tensor, states: list[Any]) -> tuple[Tensor, list[Any]]:
        x = self.embedding(inputs) if self.embedding else F.one_hot(inputs, self.vocab_size).float()
        x, after = self.dropout(x), []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, state)
            x = self.dropout(x)
            after.append(state)
        return self.decoder(x), after


def _detached(state: Any) -> Any:
    return tuple(tensor.detach() for tensor in state) if isinstance(state, tuple) else state.detach()


def plain(task: str, case: Case, precision: str, compiled: bool = False) -> Work:
    """The same work on PyTorch's own layers: cross_entropy, clip_grad_norm_, SGD; log_softmax, topk."""
    training = case.recipe.training
    network = _Plain(case).train(task == "train")
    forward: Any = torch.compile(network) if compiled else network
    optimizer = torch.optim.SGD(network.parameters(), lr=training.learning_rate)
    streams = {"train": training.batch_size, "score": SCORED_STREAMS, "next-word": 1}[task]
    states: list[Any] = [None] * len(network.layers)
    windows = case.windows(streams)
    ids = torch.from_numpy(case.ids[:4096].astype(np.int64))

    def train(count: int) -> None:
        nonlocal states
        for _ in range(count):
            inputs, targets = next(windows)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits, states = forward(inputs, states)
                nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
            states = [_detached(state) for state in states]
            optimizer.zero_grad()
            (nll / streams).backward()
            nn.utils.clip_grad_norm_(network.parameters(), training.max_grad_norm)
            optimizer.step()
            nll.item()

    @torch.inference_mode()
    def score(count: int) -> None:
        nonlocal states
        for _ in range(count):
            inputs, targets = next(windows)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits, states = forward(inputs, states)
                logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).sum().item()

    @torch.inference_mode()
    def next_word(count: int) -> None:
        nonlocal states
        for number in range(count):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits, states = forward(ids[number % 4096].view(1, 1), states)
                logits[0, 0].float().log_softmax(-1).topk(10)

    return {"train": train, "score": score, "next-word": next_word}[task]


def products(case: Case) -> Work:
    """The matrix products of a training step by PyTorch in bf16, and nothing else: what they allow at these shapes."""
    model, training = build_model(case.recipe.model, case.vocab_size), case.recipe.training
    streams, tokens = training.batch_size, training.batch_size * training.num_steps
    shapes: list[tuple[int, int, int, int]] = []  # rows, depth, columns; how often
    for number, cell in enumerate(model.layers):
        slots, hidden = cell.weight_hh.shape
        shapes += [(streams, hidden, slots, training.num_steps), (streams, slots, hidden, training.num_steps)]
        shapes += [(slots, tokens, hidden, 1)]
        if number or case.recipe.model.embedding_size:
            inputs = cell.weight_ih.shape[1]
            shapes += [(tokens, inputs, slots, 1), (tokens, slots, inputs, 1), (slots, tokens, inputs, 1)]
    top, words = model.layers[-1].hidden_size, case.vocab_size
    shapes += [(tokens, top, words, 1), (tokens, words, top, 1), (words, tokens, top, 1)]
    pairs = [
        (torch.ones(rows, depth, dtype=torch.bfloat16), torch.ones(depth, columns, dtype=torch.bfloat16), times)
        for rows, depth, columns, times in shapes
    ]

    def train(count: int) -> None:
        for _ in range(count):
            for a, b, times in pairs:
                for _ in range(times):
                    a @ b

    return train


def peer(command: str, case: Case) -> Work:
    """Training by another program, which keeps to the protocol at the head of this file."""
    with tempfile.NamedTemporaryFile(suffix=".npy", delete=False) as file:
        np.save(file, case.ids)
    work = {"recipe": case.recipe.model_dump(mode="json"), "ids": file.name, "vocab_size": case.vocab_size}
    process = subprocess.Popen(
        [*shlex.split(command), json.dumps(work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None

    def train(count: int) -> None:
        stdin.write(f"{count}\n")
        stdin.flush()
        if not stdout.readline():
            raise UnrolledError(f"{command} ended with status {process.wait()}")

    return train


# ------------------------------------------------------------------------------------------------ measuring

SUBJECTS: dict[str, Callable[[str, Case], Work]] = {
    BASELINE: lambda task, case: plain(task, case, "f32"),
    "torch bf16": lambda task, case: plain(task, case, "bf16"),
    "torch compiled": lambda task, case: plain(task, case, "bf16", compiled=True),
    "unrolled bf16": lambda task, case: ours(task, case, "bf16"),
    "unrolled f32": lambda task, case: ours(task, case, "f32"),
    "unrolled on PyTorch alone": lambda task, case: ours(task, case, "bf16", kernels=False),
    PRODUCTS: lambda task, case: products(case),
}


def bench(
    recipe: str = "ptb-small",
    tasks: tuple[str, ...] = ("train", "score", "next-word"),
    subjects: tuple[str, ...] = tuple(SUBJECTS),
    rounds: int = 5,
    seconds: float = 2.0,
) -> Iterator[dict[str, Any]]:
    """Times the subjects at a recipe's tasks, one round of all after another.

    Args:
        recipe: a shipped name or a file.
        tasks: of `TASKS`.
        subjects: of `SUBJECTS`; the baseline is always among them.
        rounds: how often each is timed.
        seconds: how long a round of one takes, about.

    Yields:
        For each task and subject {"subject", "recipe", "task", "median", "minimum", "maximum", "unit",
        "ratio_to_baseline", "share_of_ceiling", "peak_memory_mib"}; the ratio is above 1 for what is faster.

    Raises:
        UnrolledError: there is no such recipe, task or subject, or nothing to time.
    """
    for name, known in ((tasks, TASKS), (subjects, SUBJECTS)):
        for unknown in (one for one in name if one not in known and "=" not in one):
            raise UnrolledError(
                f"no {'task' if known is TASKS else 'subject'} {unknown!r}; there are " + ", ".join(known)
            )
    if rounds < 1 or not 0 < seconds < math.inf:
        raise UnrolledError(f"a benchmark takes one round or more and some seconds, not {rounds} and {seconds:g}")
    training, flop = load_recipe(recipe).training, case(recipe).flop_per_token
    for task in tasks:
        tokens = {"train": training.batch_size, "score": SCORED_STREAMS, "next-word": 1}[task]
        tokens *= 1 if task == "next-word" else training.num_steps
        names = list(
            dict.fromkeys((BASELINE, *(name for name in subjects if task == "train" or not _only_trains(name))))
        )
        speeds: dict[str, list[float]] = {name: [] for name in (*names, _CEILING)}
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
                "peak_memory_mib": memory[name],
            }


class _Worker:
    """A subject in a process of its own, where no other's memory or threads are in its way; it waits between rounds."""

    def __init__(self, recipe: str, task: str, subject: str, seconds: float) -> None:
        context = multiprocessing.get_context("spawn")
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
        self.connection.send(what)
        answer = self.connection.recv()
        if isinstance(answer, UnrolledError):
            raise answer
        return answer


def _serve(connection: Connection, recipe: str, task: str, subject: str, seconds: float) -> None:
    """Makes the work ready and warm, then does a round of it whenever asked."""
    connection.recv()
    try:
        work = _ceiling if subject == _CEILING else _subject(subject, task, case(recipe))
        work(3)
    except UnrolledError as error:
        connection.send(error)
        return
    count = max(1, math.ceil(seconds / _seconds_a_step(work, 3)))
    connection.send(None)
    while True:
        if connection.recv() == "work":
            connection.send(_seconds_a_step(work, count))
        else:
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
            connection.send(None if "=" in subject else most / (2**20 if sys.platform == "darwin" else 2**10))


def _only_trains(subject: str) -> bool:
    return "=" in subject or subject == PRODUCTS


def _subject(name: str, task: str, case: Case) -> Work:
    known, _, command = name.partition("=")
    return peer(command, case) if command else SUBJECTS[known](task, case)


def _ceiling(count: int) -> None:
    """Square products in bf16 by PyTorch: what the processor can be had to do."""
    a, b = (torch.ones(_CEILING_SIZE, _CEILING_SIZE, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(count):
        a @ b


def _seconds_a_step(work: Work, count: int) -> float:
    begun = time.perf_counter()
    work(count)
    return (time.perf_counter() - begun) / count
