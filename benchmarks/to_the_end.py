"""A recipe trained to its end twice: as `unrolled train` does it, and in plain f32 on torch.nn.LSTM.

python benchmarks/to_the_end.py [RECIPE] [--seed 1] [--skip-ours]                 (ptb-small when left out; no dropout)

The other side is what a PyTorch user writes: nn.LSTM, cross_entropy, clip_grad_norm_, SGD with the recipe's rates,
validation after each epoch. Prints a line of JSON for each side: seconds of training and validation, and the test
perplexity of the best validation, and of the last epoch.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from parity import Plain

import unrolled
from unrolled.data.batches import Windows
from unrolled.data.dataset import prepare
from unrolled.data.text import open_corpus
from unrolled.data.tokens import Vocabulary
from unrolled.inference.evaluate import evaluate_exact
from unrolled.nn.loss import perplexity
from unrolled.nn.model import LanguageModel
from unrolled.recipe import Recipe, load_recipe
from unrolled.run import build_model
from unrolled.training.optim import learning_rate


def ours(recipe: Recipe) -> dict[str, str | float]:
    """`unrolled train`, in the precision that it takes by itself."""
    with tempfile.TemporaryDirectory() as folder:
        run = unrolled.train(recipe, out=Path(folder) / "run")
        return {
            "side": "unrolled",
            "seconds": round(run.manifest["training_s"], 1),
            "test_of_best": round(run.manifest["results"]["test"]["perplexity"], 2),
        }


def theirs(recipe: Recipe) -> dict[str, str | float]:
    """The same recipe on nn.LSTM in f32."""
    training = recipe.training
    dataset = prepare(open_corpus(recipe.data.corpus), Vocabulary("word", recipe.data.vocab_size))
    torch.manual_seed(training.seed)
    model = build_model(recipe.model, len(dataset.tokenizer))
    train, valid = (
        Windows(dataset.ids[split], training.batch_size, training.num_steps) for split in ("train", "valid")
    )
    plain = Plain(recipe, train, model)
    zeros = model.initial_state(training.batch_size)
    begun, best = time.perf_counter(), float("inf")
    kept: list[torch.Tensor] = []
    for epoch in range(1, training.max_epochs + 1):
        plain.begin_epoch(train, zeros, learning_rate(training, epoch, 0, 1))
        nats = sum(plain.step() for _ in range(len(train))) / len(train)
        valid_nats = plain.evaluate(valid, zeros)
        if valid_nats < best:
            best, kept = valid_nats, [parameter.detach().clone() for parameter in plain.parameters]
        print(f"epoch {epoch}: train {perplexity(nats, 1):.2f}, valid {perplexity(valid_nats, 1):.2f}", flush=True)
    seconds = time.perf_counter() - begun
    found: dict[str, str | float] = {"side": "torch f32", "seconds": round(seconds, 1)}
    for name, values in (("test_of_best", kept), ("test_of_last", plain.parameters)):
        found[name] = round(_test(model, values, dataset.ids["test"]), 2)
    return found


@torch.no_grad()
def _test(model: LanguageModel, values: Sequence[torch.Tensor], ids: np.ndarray) -> float:
    for mine, value in zip(model.parameters(), values, strict=True):
        mine.copy_(value)
    return evaluate_exact(model.eval(), ids).perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="ptb-small")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skip-ours", action="store_true")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe).changed({"training.seed": arguments.seed})
    for side in (theirs,) if arguments.skip_ours else (ours, theirs):
        print(json.dumps({"recipe": recipe.name, "seed": arguments.seed} | side(recipe)), flush=True)


if __name__ == "__main__":
    main()
