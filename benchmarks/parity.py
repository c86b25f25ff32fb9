"""A recipe's training against the same model on plain torch.nn.LSTM: the same first values, text and rate, no dropout.

Both take the same steps, in f32; PyTorch's own cross-entropy, clipping and SGD stand on the other side. The figures are
the perplexity of the steps so far by either and how far they are apart. Where a training is chaotic at first, as that
of `ptb-large` is without its dropout, the rounding of the last digit decides after some twenty steps how it goes on;
with --locked the other side begins every step with our values, so that each step is compared by itself: its loss, and
the change that it makes to the parameters.

    python benchmarks/parity.py [RECIPE] [--steps N] [--locked]        (an epoch when left out)
"""

import argparse
import math
import time
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unrolled.data.batches import Windows
from unrolled.data.dataset import prepare
from unrolled.data.text import open_corpus
from unrolled.data.tokens import Vocabulary
from unrolled.folder import hardware
from unrolled.kernels.build import in_use
from unrolled.nn.loss import perplexity
from unrolled.nn.model import LanguageModel
from unrolled.nn.unroll import LayerStates
from unrolled.recipe import Recipe, load_recipe
from unrolled.run import build_model
from unrolled.training.loop import run_epoch
from unrolled.training.optim import make_optimizer
from unrolled.training.resume import Position


class Ours:
    """Our loop, a step at a time."""

    def __init__(self, recipe: Recipe, windows: Windows, model: LanguageModel) -> None:
        self.recipe, self.windows, self.model, self.position = recipe, windows, model, Position()
        self.optimizer = make_optimizer(model, recipe.training)
        self.states: LayerStates = model.initial_state(recipe.training.batch_size)

    def step(self) -> float:
        """Nats per token."""
        losses: list[float] = []

        def after_step(states: LayerStates, figures: dict[str, float]) -> bool:
            losses.append(figures["nll_nats_per_token"])
            return False

        training = self.recipe.training
        self.states = run_epoch(
            self.model, self.optimizer, self.windows, self.states, training, self.position, after_step
        )
        return losses[0]


class Plain:
    """The same on nn.LSTM layers that begin with the model's values."""

    def __init__(self, recipe: Recipe, windows: Windows, model: LanguageModel) -> None:
        self.training = recipe.training
        sizes = [recipe.model.embedding_size, *recipe.model.hidden_sizes]
        self.embedding = nn.Embedding(model.vocab_size, sizes[0])
        self.layers = nn.ModuleList(nn.LSTM(size, hidden) for size, hidden in pairwise(sizes))
        self.decoder = nn.Linear(sizes[-1], model.vocab_size)
        for lstm in self.layers if recipe.model.join == "concatenate" else ():  # which has no second bias
            nn.init.zeros_(getattr(lstm, "bias_hh_l0").requires_grad_(False))  # noqa: B009
        modules = nn.ModuleList([self.embedding, *self.layers, self.decoder])
        self.parameters = [parameter for parameter in modules.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(self.parameters, lr=self.training.learning_rate)
        self.windows = iter(windows)
        self.take(model, model.initial_state(self.training.batch_size))

    @torch.no_grad()
    def take(self, model: LanguageModel, states: LayerStates) -> None:
        """Parameters in both lie in the order embedding, layers, decoder."""
        for mine, theirs in zip(self.parameters, model.parameters(), strict=True):
            mine.copy_(theirs)
        self.states = [(h.unsqueeze(0), c.unsqueeze(0)) for h, c in states]

    def begin_epoch(self, windows: Windows, states: LayerStates, rate: float) -> None:
        """From the first window and these states, at this rate."""
        self.windows, self.optimizer.param_groups[0]["lr"] = iter(windows), rate
        self.states = [(h.unsqueeze(0), c.unsqueeze(0)) for h, c in states]

    @torch.no_grad()
    def evaluate(self, windows: Windows, states: LayerStates) -> float:
        """Nats per token of other windows."""
        self.begin_epoch(windows, states, self.training.learning_rate)
        return sum(self._nll(*window).item() for window in self.windows) / windows.targets.size

    def _nll(self, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(inputs)
        for number, lstm in enumerate(self.layers):
            hidden, (h, c) = lstm(hidden, self.states[number])
            self.states[number] = h.detach(), c.detach()
        return F.cross_entropy(self.decoder(hidden).flatten(0, 1), targets.flatten(), reduction="sum")

    def step(self) -> float:
        """Nats per token."""
        inputs, targets = next(self.windows)
        nll = self._nll(inputs, targets)
        self.optimizer.zero_grad()
        (nll / self.training.batch_size).backward()
        nn.utils.clip_grad_norm_(self.parameters, self.training.max_grad_norm)
        self.optimizer.step()
        return nll.item() / targets.numel()


@torch.no_grad()
def change_apart(before: list[Tensor], ours: Ours, theirs: Plain) -> float:
    """How far a step's two changes of the parameters are apart, relative to ours."""
    squares = [0.0, 0.0]
    for was, mine, other in zip(before, ours.model.parameters(), theirs.parameters, strict=True):
        squares[0] += (mine - other).double().square().sum().item()
        squares[1] += (mine - was).double().square().sum().item()
    return math.sqrt(squares[0] / squares[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="ptb-medium")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--locked", action="store_true")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe).changed({"model.dropout": 0.0, "training.precision": "f32"})
    dataset = prepare(open_corpus(recipe.data.corpus), Vocabulary("word", recipe.data.vocab_size))
    windows = Windows(dataset.ids["train"], recipe.training.batch_size, recipe.training.num_steps)
    steps = min(options.steps or len(windows), len(windows))
    torch.manual_seed(recipe.training.seed)
    model = build_model(recipe.model, len(dataset.tokenizer))
    theirs, ours = Plain(recipe, windows, model), Ours(recipe, windows, model)
    losses: list[tuple[float, float]] = []
    changes: list[float] = []
    seconds = [0.0, 0.0]
    for _ in range(steps):
        before = [parameter.detach().clone() for parameter in model.parameters()] if options.locked else []
        if options.locked:
            theirs.take(model, ours.states)
        begun = time.perf_counter()
        mine = ours.step()
        half = time.perf_counter()
        losses.append((mine, theirs.step()))
        seconds[0] += half - begun
        seconds[1] += time.perf_counter() - half
        if options.locked:
            changes.append(change_apart(before, ours, theirs))
    machine = hardware(torch.device("cpu"))
    print(
        f"{recipe.name}, {model.num_parameters():,} parameters, no dropout, seed {recipe.training.seed}, {steps} steps"
        + ", each with the same values" * options.locked
    )
    print(
        f"{machine['processor']}, {machine['threads']} threads, torch {torch.__version__}, f32, kernels {in_use()}; "
        f"{seconds[0]:.0f} s and {seconds[1]:.0f} s"
    )
    print(f"loss before training {losses[0][0]:.4f} nats a word; ln V = {math.log(len(dataset.tokenizer)):.4f}")
    print(f"{'steps':>6} {'unrolled':>10} {'nn.LSTM':>10} {'apart':>9}   perplexity of the steps so far")
    for end in sorted({max(1, steps * part // 10) for part in (1, 2, 4, 6, 8, 10)}):
        first, second = (perplexity(sum(side), end) for side in zip(*losses[:end], strict=True))
        print(f"{end:6} {first:10.3f} {second:10.3f} {abs(first / second - 1):9.1e}")
    print(f"largest relative difference of one step's loss {max(abs(a / b - 1) for a, b in losses):.1e}")
    if changes:
        print(f"of its change of the parameters {max(changes):.1e}, the median {sorted(changes)[steps // 2]:.1e}")


if __name__ == "__main__":
    main()
