"""A recipe's training against the same model on plain torch.nn.LSTM: the same first values, text and rate, no dropout.

Both take the same steps; the figures are the perplexity of the steps so far by either, how far they are apart, and the
largest difference of a single window's loss. PyTorch's own cross-entropy, clipping and SGD stand on the other side.

    python benchmarks/parity.py [RECIPE] [--steps N]        (an epoch when left out)
"""

import argparse
import math
import time
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unrolled.data.batches import Windows
from unrolled.data.dataset import prepare
from unrolled.data.text import open_corpus
from unrolled.data.tokens import Vocabulary
from unrolled.folder import hardware
from unrolled.nn.loss import perplexity
from unrolled.nn.model import LanguageModel
from unrolled.recipe import Recipe, load_recipe
from unrolled.run import build_model
from unrolled.training.loop import run_epoch
from unrolled.training.optim import make_optimizer
from unrolled.training.resume import Position


def ours(model: LanguageModel, recipe: Recipe, windows: Windows, steps: int) -> list[float]:
    """Nats per token of each step of our loop."""
    losses: list[float] = []
    optimizer = make_optimizer(model, recipe.training)

    def after_step(states: object, figures: dict[str, float]) -> bool:
        losses.append(figures["nll_nats_per_token"])
        return len(losses) < steps

    states = model.initial_state(recipe.training.batch_size)
    run_epoch(model, optimizer, windows, states, recipe.training, Position(), after_step)
    return losses


def plain(model: LanguageModel, recipe: Recipe, windows: Windows, steps: int) -> Iterator[float]:
    """The same on nn.LSTM layers that begin with the model's values."""
    training, sizes = recipe.training, [recipe.model.embedding_size, *recipe.model.hidden_sizes]
    layers = [nn.LSTM(size, hidden) for size, hidden in pairwise(sizes)]
    for lstm, cell in zip(layers, model.layers, strict=True):
        for name, parameter in cell.named_parameters():
            getattr(lstm, f"{name}_l0").data.copy_(parameter)
        nn.init.zeros_(getattr(lstm, "bias_hh_l0").requires_grad_(False))  # noqa: B009
    embedding, decoder = model.embedding, model.decoder
    modules = nn.ModuleList([embedding, *layers, decoder])
    parameters = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=training.learning_rate)
    states: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)
    for _, (inputs, targets) in zip(range(steps), windows, strict=False):
        hidden = embedding(inputs)
        for number, lstm in enumerate(layers):
            hidden, (h, c) = lstm(hidden, states[number])
            states[number] = h.detach(), c.detach()
        nll = F.cross_entropy(decoder(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
        optimizer.zero_grad()
        (nll / training.batch_size).backward()
        nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        yield nll.item() / targets.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="ptb-medium")
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    recipe = load_recipe(options.recipe).changed({"model.dropout": 0.0})
    dataset = prepare(open_corpus(recipe.data.corpus), Vocabulary("word", recipe.data.vocab_size))
    windows = Windows(dataset.ids["train"], recipe.training.batch_size, recipe.training.num_steps)
    steps = min(options.steps or len(windows), len(windows))
    results, seconds = [], []
    for way in (ours, plain):
        torch.manual_seed(recipe.training.seed)
        model = build_model(recipe.model, len(dataset.tokenizer))
        begun = time.perf_counter()
        results.append(list(way(model, recipe, windows, steps)))
        seconds.append(time.perf_counter() - begun)
    machine = hardware(torch.device("cpu"))
    print(
        f"{recipe.name}, {model.num_parameters():,} parameters, no dropout, seed {recipe.training.seed}, {steps} steps"
    )
    print(f"{machine['processor']}, {machine['threads']} threads, torch {torch.__version__}")
    print(f"loss before training {results[0][0]:.4f} nats a word; ln V = {math.log(len(dataset.tokenizer)):.4f}")
    print(f"{'steps':>6} {'unrolled':>10} {'nn.LSTM':>10} {'apart':>9}   perplexity of the steps so far")
    for end in sorted({max(1, steps * part // 10) for part in (1, 2, 4, 6, 8, 10)}):
        first, second = (perplexity(sum(losses[:end]), end) for losses in results)
        print(f"{end:6} {first:10.3f} {second:10.3f} {abs(first / second - 1):9.1e}")
    largest = max(abs(a - b) for a, b in zip(*results, strict=True))
    print(
        f"largest difference of one window's loss {largest:.1e} nats a word; {seconds[0]:.0f} s and {seconds[1]:.0f} s"
    )


if __name__ == "__main__":
    main()
