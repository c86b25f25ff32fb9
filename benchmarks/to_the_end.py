"""A recipe trained to its end twice: as `unrolled train` does it, and in plain f32 on torch.nn.LSTM.

python benchmarks/to_the_end.py [RECIPE] [--seed 1] [--max-epochs N]              (ptb-small when left out; no dropout)

The other side is what a PyTorch user writes: nn.LSTM, cross_entropy, clip_grad_norm_, SGD with the recipe's rates,
validation after each epoch. Each side is a process of its own, and they take turns, an epoch each: what the machine
does in the meantime concerns both. Prints a line of JSON for each epoch of each side, then one for each side: seconds
from its start to its end, preparing, validating and saving included, and the test perplexity of the best validation.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from parity import Plain

import unrolled
from unrolled.data.batches import Windows
from unrolled.data.dataset import prepare
from unrolled.data.text import open_corpus
from unrolled.data.tokens import Vocabulary
from unrolled.inference.evaluate import evaluate_exact
from unrolled.kernels import build
from unrolled.nn.loss import perplexity
from unrolled.recipe import Recipe, load_recipe
from unrolled.run import build_model
from unrolled.training.optim import learning_rate

Report = Callable[[dict[str, Any]], None]
"""Tells of an epoch, and waits for the next turn."""


def ours(recipe: Recipe, report: Report) -> float:
    """`unrolled train`, in the precision that it takes by itself."""

    def progress(event: dict[str, Any]) -> None:
        if event["event"] == "epoch":
            report({name: event[name] for name in ("epoch", "train_perplexity", "valid_perplexity")})

    with tempfile.TemporaryDirectory() as folder:
        run = unrolled.train(recipe, out=Path(folder) / "run", progress=progress)
        return run.manifest["results"]["test"]["perplexity"]


def theirs(recipe: Recipe, report: Report) -> float:
    """The same recipe on nn.LSTM in f32."""
    training = recipe.training
    dataset = prepare(open_corpus(recipe.data.corpus), Vocabulary("word", recipe.data.vocab_size))
    torch.manual_seed(training.seed)
    with build.switched_off():  # which would change how this process takes memory, too
        model = build_model(recipe.model, len(dataset.tokenizer))
    train, valid = (
        Windows(dataset.ids[split], training.batch_size, training.num_steps) for split in ("train", "valid")
    )
    plain = Plain(recipe, train, model)
    zeros = model.initial_state(training.batch_size)
    best, kept = float("inf"), list[torch.Tensor]()
    for epoch in range(1, training.max_epochs + 1):
        plain.begin_epoch(train, zeros, learning_rate(training, epoch, 0, 1))
        nats = sum(plain.step() for _ in range(len(train))) / len(train)
        valid_nats = plain.evaluate(valid, zeros)
        if valid_nats < best:
            best, kept = valid_nats, [parameter.detach().clone() for parameter in plain.parameters]
        found = {"train_perplexity": perplexity(nats, 1), "valid_perplexity": perplexity(valid_nats, 1)}
        report({"epoch": epoch} | found)
    with torch.no_grad():
        for mine, value in zip(model.parameters(), kept, strict=True):
            mine.copy_(value)
    return evaluate_exact(model.eval(), dataset.ids["test"]).perplexity


SIDES = {"unrolled": ours, "torch f32": theirs}


def take_turns(side: str, recipe: Recipe, turn: Connection) -> None:
    """A side in its own process; its clock stands still while the other has its turn."""
    turn.recv()
    seconds, since = 0.0, time.perf_counter()

    def report(figures: dict[str, Any]) -> None:
        nonlocal seconds, since
        seconds += time.perf_counter() - since
        turn.send({"side": side, "seconds": round(seconds, 1)} | figures)
        turn.recv()
        since = time.perf_counter()

    test = SIDES[side](recipe, report)
    seconds += time.perf_counter() - since
    turn.send({"recipe": recipe.name, "seed": recipe.training.seed, "side": side, "seconds": seconds, "test": test})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="ptb-small")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-epochs", type=int)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe).changed({"training.seed": arguments.seed, "training.save_every_s": 1e6})
    if recipe.model.dropout:
        parser.error(f"{recipe.name} has dropout, which the other side leaves out")
    if arguments.max_epochs:
        recipe = recipe.changed({"training.max_epochs": arguments.max_epochs})
    spawn, turns = multiprocessing.get_context("spawn"), list[Connection]()
    for side in SIDES:
        mine, its = spawn.Pipe()
        spawn.Process(target=take_turns, args=(side, recipe, its), daemon=True).start()
        its.close()
        turns.append(mine)
    for _ in range(recipe.training.max_epochs + 1):
        for turn in turns:
            turn.send("go")
            print(json.dumps(turn.recv()), flush=True)


if __name__ == "__main__":
    main()
