"""What `bench` times: a recipe's training, scoring and next words by us, by PyTorch's own layers, by other programs.

Every subject is a function that makes the work ready and returns `work(count)`, which does so many steps of it. It may
also be a program, NAME=COMMAND, such as benchmarks/peers/jax_lm.py in an environment of its own, that is given the work
as JSON {"recipe", "ids" (a .npy file), "vocab_size"}, and answers every count on its standard input with the same when
it has taken so many training steps.
"""

import json
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unrolled.data.batches import Windows
from unrolled.data.text import KNOWN, is_at_hand
from unrolled.errors import UnrolledError
from unrolled.kernels import build
from unrolled.nn.loss import token_nll
from unrolled.nn.stream import Stream
from unrolled.recipe import Recipe, load_recipe
from unrolled.run import build_model
from unrolled.training.loop import run_epoch
from unrolled.training.optim import make_optimizer
from unrolled.training.resume import Position
from unrolled.training.start import make_dataset

Work = Callable[[int], None]

BASELINE, PRODUCTS = "torch f32", "products alone, torch"
SCORED_STREAMS = 64
_LAST_WORDS_S = 5
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


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

    def tokens(self) -> Iterator[Tensor]:
        """Ids (1,) without end."""
        ids = torch.from_numpy(self.ids[:1_000_000].astype(np.int64))
        while True:
            for place in range(len(ids)):
                yield ids[place : place + 1]

    @property
    def flop_per_token(self) -> float:
        """Of training, in the products alone: two for each weight forward, four backward."""
        model = build_model(self.recipe.model, self.vocab_size)
        one_hot = self.recipe.model.embedding_size == 0
        weights = sum(cell.weight_hh.numel() for cell in model.layers)
        weights += sum(cell.weight_ih.numel() for cell in model.layers[one_hot:])
        return 6.0 * (weights + self.vocab_size * model.layers[-1].hidden_size)


def case(name: str) -> Case:
    """A recipe with its own text, or where that is a known one and not here, with ids drawn as Zipf has them."""
    recipe = load_recipe(name)
    data = recipe.data
    if is_at_hand(data.corpus) or data.corpus not in KNOWN:
        dataset = make_dataset(recipe, lambda event: None)
        return Case(recipe, dataset.ids["train"], len(dataset.tokenizer), dataset.name)
    size = {"character": 27, "byte": 256}.get(data.tokens, data.vocab_size or 10_000)
    shares = 1 / np.arange(1, size + 1)
    ids = np.random.default_rng(1).choice(size, 1_000_000, p=shares / shares.sum())
    return Case(recipe, ids, size, "random ids")


def refuse_incomparable(recipe: Recipe) -> Recipe:
    """The recipe, where PyTorch's own layers can do what it asks for.

    Raises:
        UnrolledError: they cannot.
    """
    if recipe.model.tie_weights or recipe.model.cell == "jordan":
        raise UnrolledError(
            f"{recipe.name} cannot be timed beside PyTorch's own layers: only recipes with a decoder of their own "
            "and no Jordan network can, ptb-small for one"
        )
    return recipe


# ------------------------------------------------------------------------------------------------ ours


def ours(task: str, case: Case, precision: str, kernels: bool = True) -> Work:
    """This package: the training loop of `unrolled train`, and the model as `score` and `Run.session` ask it."""
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
        last = position.step + count
        while position.step < last:
            position.window %= len(windows)
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
    ids = case.tokens()

    def work(count: int) -> None:
        for _ in range(count):
            stream.likeliest(next(ids), 10)

    return work


# ------------------------------------------------------------------------------------------------ PyTorch's own layers


class _Plain(nn.Module):
    """The recipe's network as a PyTorch user writes it, on nn.LSTM, nn.GRU or nn.RNN."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        model = case.recipe.model
        size = model.embedding_size or case.vocab_size
        self.embedding = nn.Embedding(case.vocab_size, size) if model.embedding_size else None
        layer = {"lstm": nn.LSTM, "gru": nn.GRU, "elman": nn.RNN}.get(model.cell)
        if layer is None:
            raise UnrolledError(f"PyTorch has no layer to compare {case.recipe.name} with: its cell is {model.cell}")
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
    """The same work on PyTorch's own layers: cross_entropy, clip_grad_norm_, SGD or AdamW; log_softmax, topk."""
    training = case.recipe.training
    network = _Plain(case).train(task == "train")
    forward: Any = torch.compile(network) if compiled else network
    if training.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(network.parameters(), lr=training.learning_rate)
    else:
        decay = training.weight_decay
        optimizer = torch.optim.AdamW(network.parameters(), training.learning_rate, weight_decay=decay, fused=True)
    streams = {"train": training.batch_size, "score": SCORED_STREAMS, "next-word": 1}[task]
    states: list[Any] = [None] * len(network.layers)
    windows = case.windows(streams)
    ids = case.tokens()

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
        for _ in range(count):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits, states = forward(next(ids).view(1, 1), states)
                logits[0, 0].float().log_softmax(-1).topk(10)

    return {"train": train, "score": score, "next-word": next_word}[task]


def products(case: Case) -> Work:
    """The matrix products of a training step by PyTorch, and nothing else: what they allow at these shapes."""
    training = case.recipe.training
    with build.switched_off():  # the kernels would change how this process takes memory
        model = build_model(case.recipe.model, case.vocab_size)
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
    dtype = DTYPES[fastest_precision()]
    pairs = [
        (torch.ones(rows, depth, dtype=dtype), torch.ones(depth, columns, dtype=dtype), times)
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
    folder = tempfile.TemporaryDirectory()
    path = f"{folder.name}/ids.npy"
    np.save(path, case.ids)
    work = {"recipe": case.recipe.model_dump(mode="json"), "ids": path, "vocab_size": case.vocab_size}
    process = subprocess.Popen(
        [*shlex.split(command), json.dumps(work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None

    def train(count: int) -> None:
        answer = ""
        with suppress(BrokenPipeError):
            stdin.write(f"{count}\n")
            stdin.flush()
            answer = stdout.readline()
        if not answer:
            try:
                status = process.wait(_LAST_WORDS_S)
            except subprocess.TimeoutExpired as error:
                process.kill()
                raise UnrolledError(f"{command} closed its output") from error
            raise UnrolledError(f"{command} ended with status {status}")
        if answer.strip() != str(count):
            raise UnrolledError(f"{command} was asked for {count} steps and answered {answer[:80].strip()!r}")
        folder.cleanup()  # it has been read

    return train


def fastest_precision() -> str:
    """What products are timed in where a subject's name does not say: bf16 where the processor multiplies it."""
    return "bf16" if build.processor_multiplies_bf16() else "f32"


def usual_subjects() -> tuple[str, ...]:
    """All that are of use on this processor: those in bf16 only where it multiplies it."""
    return tuple(name for name in SUBJECTS if not name.endswith("bf16") or fastest_precision() == "bf16")


SUBJECTS: dict[str, Callable[[str, Case], Work]] = {
    BASELINE: lambda task, case: plain(task, case, "f32"),
    "torch bf16": lambda task, case: plain(task, case, "bf16"),
    "torch compiled": lambda task, case: plain(task, case, fastest_precision(), compiled=True),
    "unrolled bf16": lambda task, case: ours(task, case, "bf16"),
    "unrolled f32": lambda task, case: ours(task, case, "f32"),
    "unrolled on PyTorch alone": lambda task, case: ours(task, case, fastest_precision(), kernels=False),
    PRODUCTS: lambda task, case: products(case),
}
