"""The exact resume point: all that decides how a training goes on, in one file.

`last/resume.safetensors` holds the weights, the optimiser's tensors, the random states and the recurrent state; its
metadata the position: epoch, window, step, the sums of the running epoch, the best validation so far. A training that
is broken off and goes on from here ends bit for bit where the unbroken one ends (on the CPU, in as many processes). The
point before it is kept as `last/previous.safetensors`.
"""

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import final

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter

from unrolled.errors import UnrolledError
from unrolled.folder import read_tensors, write_tensors
from unrolled.metrics import cut_metrics
from unrolled.nn.loss import perplexity
from unrolled.nn.model import LanguageModel
from unrolled.nn.unroll import LayerStates
from unrolled.recipe import Training
from unrolled.training.distributed import ALONE, Ranks

SAVING_SHARE = 0.02
"""No more of the time than this goes into resume points."""
MOST_SKIPPED, MOST_ROLLBACKS, LOWER = 10, 3, 0.5
"""Steps in a row without a finite gradient before the training goes back, how often it does, what the rate becomes."""
STAND_IN = "stand_in"
"""Marks weights that `unrolled repair` took from a resume point, in place of the best."""


@dataclass
class Position:
    """Where a training stands. Nats and tokens are those of the running epoch."""

    epoch: PositiveInt = 1
    window: NonNegativeInt = 0
    step: NonNegativeInt = 0
    nll_nats: float = 0.0
    tokens: NonNegativeInt = 0
    best_valid_perplexity: float | None = None
    elapsed_s: float = 0.0
    skipped: NonNegativeInt = 0
    """Steps that were not taken, for their loss or gradient was not finite; and how many of them just now in a row."""
    skipped_in_a_row: NonNegativeInt = 0
    rollbacks: NonNegativeInt = 0
    """How often the training went back to an earlier point after such steps, and what that made of the rate."""
    rate_factor: PositiveFloat = 1.0

    @property
    def train_perplexity(self) -> float:
        """Of the running epoch so far; infinite before its first step."""
        return perplexity(self.nll_nats, self.tokens) if self.tokens else math.inf


def resume_files(run: Path) -> tuple[Path, Path]:
    """Where a run folder keeps its resume point, and the one before it."""
    return run / "last" / "resume.safetensors", run / "last" / "previous.safetensors"


def can_resume(run: Path) -> bool:
    """Whether there is a resume point; between two renames it is the one before that is there."""
    return any(file.is_file() for file in resume_files(run))


def save_point(
    run: Path,
    id: str | None,
    position: Position,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    states: LayerStates,
    ranks: Ranks = ALONE,
) -> None:
    """Writes the resume point of the run `id`, whole or not at all; of several processes, with the streams of all."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, slot in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in slot.items() if tensor is not None}
    for layer, state in enumerate(states):
        tensors |= {f"state.{layer}.{part}": ranks.join(tensor) for part, tensor in enumerate(state)}
    for rank, random in enumerate(ranks.join(torch.get_rng_state().unsqueeze(0))):
        tensors[_random("cpu", rank)] = random
    if model.device.type == "cuda":
        for rank, random in enumerate(ranks.join(torch.cuda.get_rng_state(model.device).unsqueeze(0))):
            tensors[_random("cuda", rank)] = random
    if not ranks.is_first:
        return
    file, previous = resume_files(run)
    metadata = {"position": json.dumps(asdict(position))} | ({"run": id} if id is not None else {})
    write_tensors(file, tensors, metadata, previous)


def load_point(
    run: Path,
    id: str | None,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    ranks: Ranks = ALONE,
) -> tuple[Position, LayerStates]:
    """Puts model, optimiser and random states back; returns the position and the recurrent state of this process's
    share of so many streams.

    Raises:
        UnrolledError: the resume point is missing, damaged or of another run.
    """
    file, previous = resume_files(run)
    file = file if file.is_file() else previous
    tensors, metadata = read_tensors(file, id)
    try:
        position, states = _put_back(tensors, metadata, model, optimizer, batch_size, ranks.rank)
        own = ranks.streams(batch_size)
        return position, tuple(tuple(part[own] for part in state) for state in states)
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        raise UnrolledError(f"{file} does not fit the recipe of its run") from error


@final
class Keeper:
    """What a training keeps: where it stands, its best weights, its resume points; and how it goes back to one.

    Args:
        path: the run folder.
        id: of the run, None of one from before there were any.
        training: says how often to save.
        model, optimizer: what is trained.
        ranks: who trains it; the first of them writes.
    """

    def __init__(
        self,
        path: Path,
        id: str | None,
        training: Training,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks = ALONE,
    ) -> None:
        self.path, self.id, self.training, self.model, self.optimizer = path, id, training, model, optimizer
        self.ranks, self.position = ranks, Position()
        self.states = self.zero_states()
        self._saved_at, self._saved_in = time.monotonic(), 0.0

    def zero_states(self) -> LayerStates:
        """Of this process's streams, at the beginning of an epoch."""
        streams = self.ranks.streams(self.training.batch_size)
        return self.model.initial_state(streams.stop - streams.start)

    def keep_if_best(self, valid_perplexity: float) -> bool:
        """Writes the weights where none have done better; whether they did."""
        best = self.position.best_valid_perplexity
        if (
            not math.isfinite(valid_perplexity)
            or not self.is_sound()
            or (best is not None and valid_perplexity >= best)
        ):
            return False
        self.position.best_valid_perplexity = valid_perplexity
        self._write_weights(self.position.epoch)
        return True

    def keep_some(self) -> None:
        """Writes the weights where no validation has chosen any: of a training broken off in its first epoch."""
        in_first = self.position.epoch == 1 and self.position.best_valid_perplexity is None
        if self.is_sound() and (in_first or not (self.path / "model.safetensors").exists()):
            self._write_weights(0)

    def _write_weights(self, epoch: int) -> None:
        metadata = {"epoch": str(epoch)} | ({"run": self.id} if self.id else {})
        write_tensors(self.path / "model.safetensors", self.model.state_dict(), metadata)

    def is_sound(self) -> bool:
        """Whether all weights are finite."""
        return all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

    def is_due(self) -> bool:
        """Whether to save: every so many steps and seconds, where it takes no more than its share of the time."""
        since, every = time.monotonic() - self._saved_at, self.training.save_every
        wanted = since > self.training.save_every_s or (every > 0 and self.position.step % every == 0)
        return wanted and since > self._saved_in / SAVING_SHARE and not self.position.skipped_in_a_row

    def save(self, states: LayerStates) -> None:
        """Writes the resume point, unless the last one is the better: within an accident, or with spoilt weights."""
        self.states, begun = states, time.monotonic()
        if self.position.skipped_in_a_row or not self.is_sound():
            return
        save_point(self.path, self.id, self.position, self.model, self.optimizer, states, self.ranks)
        self._saved_at = time.monotonic()
        self._saved_in = self._saved_at - begun

    def go_back(self) -> None:
        """To the resume point; what was recorded since is taken away."""
        size = self.training.batch_size
        point, self.states = load_point(self.path, self.id, self.model, self.optimizer, size, self.ranks)
        vars(self.position).update(vars(point))
        weights = self.path / "model.safetensors"
        if weights.is_file() and STAND_IN in read_tensors(weights, self.id)[1]:
            self.position.best_valid_perplexity = None  # the best were lost, so the next are
        if self.ranks.is_first:
            cut_metrics(self.path, point.step, point.epoch)

    def gives_up(self) -> bool:
        """Whether too many steps in a row could not be taken."""
        return self.position.skipped_in_a_row >= MOST_SKIPPED

    def roll_back(self) -> str:
        """To the resume point, from where the rate is lower; says so.

        Raises:
            UnrolledError: this has been done often enough.
        """
        before = replace(self.position)
        self.go_back()
        here = self.position
        here.skipped, here.elapsed_s = before.skipped, before.elapsed_s
        told = f"{MOST_SKIPPED} steps in a row up to {before.step:,} had no finite loss and gradient"
        if before.rollbacks == MOST_ROLLBACKS:
            raise UnrolledError(
                f"{told}, at {before.rate_factor:g} of the recipe's rate; {self.path} keeps the state of step "
                f"{here.step:,}; begin anew with a lower --training.learning-rate or --training.max-grad-norm"
            )
        here.rollbacks, here.rate_factor = before.rollbacks + 1, before.rate_factor * LOWER
        self.save(self.states)
        return f"{told}: back to step {here.step:,}, the rate now {here.rate_factor:g} of the recipe's"


def _put_back(
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    rank: int,
) -> tuple[Position, LayerStates]:
    weights = _under("model.", tensors)
    if not all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError("the weights are not of finite numbers in f32")
    model.load_state_dict(weights)
    slots: dict[int, dict[str, torch.Tensor]] = {}
    parameters = list(model.parameters())
    for name, tensor in _under("optimizer.", tensors).items():
        number, _, slot = name.partition(".")
        expected = () if slot == "step" else parameters[int(number)].shape
        if tensor.shape != expected or tensor.dtype != torch.float32:  # the fused step would write where it must not
            raise ValueError(name)
        if not tensor.isfinite().all() or (slot == "step" and tensor < 0):
            raise ValueError(name)
        slots.setdefault(int(number), {})[slot] = tensor
    expected_slots = {"step", "exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.AdamW) else set()
    if slots and (len(slots) < len(parameters) or any(set(slot) != expected_slots for slot in slots.values())):
        raise ValueError("the optimizer's tensors are not those of its kind")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
    parts = {name: tensor.to(model.device) for name, tensor in _under("state.", tensors).items()}
    zero = model.initial_state(batch_size)
    states = tuple(tuple(parts[f"{layer}.{part}"] for part in range(len(state))) for layer, state in enumerate(zero))
    for part, expected in zip(sum(states, ()), sum(zero, ()), strict=True):
        if (part.shape, part.dtype) != (expected.shape, expected.dtype):
            raise ValueError("the recurrent state is of another size or type")
    position = TypeAdapter(Position).validate_json(metadata["position"])
    if not math.isfinite(position.elapsed_s + position.nll_nats) or position.step > 1 << 53:
        raise ValueError("no training stands there")
    if _random("cpu", rank) in tensors or rank == 0:
        torch.set_rng_state(tensors[_random("cpu", rank)])
        if _random("cuda", rank) in tensors and model.device.type == "cuda":
            torch.cuda.set_rng_state(tensors[_random("cuda", rank)], model.device)
    else:  # there were fewer processes; what this one drew at the beginning it is not to draw again
        seed(torch.initial_seed() + position.step, model.device)
    return position, states


def seed(number: int, device: torch.device) -> None:
    """PyTorch's generators that a training on this device draws from, and no other device's."""
    torch.default_generator.manual_seed(number % (1 << 63))
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number % (1 << 63))


def _random(device: str, rank: int) -> str:
    """What a random state goes by."""
    return f"random.{device}.{rank}" if rank else f"random.{device}"


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
