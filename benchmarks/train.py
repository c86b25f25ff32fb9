"""Words per second of training `ptb-small`: ours against the same model written on plain torch.nn.LSTM.

Both learn the same text from the same initial scale with the same windows, clipping and rate, alternating in one run.

    python benchmarks/train.py [--rounds 5] [--steps 100] [--corpus ptb]
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unrolled.data.batches import Windows
from unrolled.data.dataset import prepare
from unrolled.data.text import find, open_corpus
from unrolled.data.tokens import Vocabulary
from unrolled.folder import hardware
from unrolled.recipe import load_recipe
from unrolled.run import build_model
from unrolled.training.loop import run_epoch
from unrolled.training.optim import make_optimizer
from unrolled.training.resume import Position


def ours(windows: Windows, vocab_size: int) -> Callable[[int], None]:
    """Our loop, as `unrolled train ptb-small` runs it."""
    recipe = load_recipe("ptb-small")
    model = build_model(recipe.model, vocab_size)
    optimizer = make_optimizer(model.parameters(), recipe.training)
    position, states = Position(), model.initial_state(recipe.training.batch_size)

    def steps(count: int) -> None:
        nonlocal states
        last = position.step + count
        states = run_epoch(
            model, optimizer, windows, states, recipe.training, position, lambda states, figures: position.step < last
        )

    return steps


def plain(windows: Windows, vocab_size: int) -> Callable[[int], None]:
    """The same work as a PyTorch user writes it: nn.LSTM, cross_entropy, clip_grad_norm_, SGD."""
    embedding, lstm, decoder = nn.Embedding(vocab_size, 200), nn.LSTM(200, 200, 2), nn.Linear(200, vocab_size)
    parameters = [p for module in (embedding, lstm, decoder) for p in module.parameters()]
    for parameter in parameters:
        nn.init.uniform_(parameter, -0.1, 0.1)
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    state: tuple[Tensor, Tensor] | None = None
    source: Iterator[tuple[Tensor, Tensor]] = iter(windows)

    def steps(count: int) -> None:
        nonlocal state
        for _ in range(count):
            inputs, targets = next(source)
            hidden, state = lstm(embedding(inputs), state)
            state = (state[0].detach(), state[1].detach())
            nll = F.cross_entropy(decoder(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
            optimizer.zero_grad()
            (nll / 20).backward()
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            nll.item()

    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--corpus", default="ptb" if find("ptb") else "stdlib")
    options = parser.parse_args()
    dataset = prepare(open_corpus(options.corpus), Vocabulary("word", 10_000))
    windows = Windows(dataset.ids["train"], 20, 20)
    subjects = {
        "torch.nn.LSTM": plain(windows, len(dataset.tokenizer)),
        "unrolled": ours(windows, len(dataset.tokenizer)),
    }
    speeds: dict[str, list[float]] = {name: [] for name in subjects}
    for steps in subjects.values():
        steps(10)
    for _ in range(options.rounds):
        for name, steps in subjects.items():
            begun = time.perf_counter()
            steps(options.steps)
            speeds[name].append(options.steps * 400 / (time.perf_counter() - begun))
    machine = hardware(torch.device("cpu"))
    print(f"{dataset.name}; {machine['processor']}, {machine['threads']} threads, torch {torch.__version__}")
    ratios = [a / b for a, b in zip(speeds["unrolled"], speeds["torch.nn.LSTM"], strict=True)]
    for name, values in speeds.items():
        print(
            f"{name:14} {statistics.median(values):8,.0f} words/s (least {min(values):,.0f}, most {max(values):,.0f})"
        )
    print(f"ratio          {statistics.median(ratios):8.2f}         (least {min(ratios):.2f}, most {max(ratios):.2f})")


if __name__ == "__main__":
    main()
