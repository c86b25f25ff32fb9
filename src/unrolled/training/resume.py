"""The exact resume point: all that decides how a training goes on, in one file.

`last/resume.safetensors` holds the weights, the optimiser's tensors, the random states and the recurrent state; its
metadata the position: epoch, window, step, the sums of the running epoch, the best validation so far. A training that
is broken off and goes on from here ends bit for bit where the unbroken one ends (on the CPU, in one process).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from unrolled.errors import UnrolledError
from unrolled.folder import read_tensors, write_tensors
from unrolled.nn.model import LanguageModel
from unrolled.nn.unroll import LayerStates


@dataclass
class Position:
    """Where a training stands. Nats and tokens are those of the running epoch."""

    epoch: int = 1
    window: int = 0
    step: int = 0
    nll_nats: float = 0.0
    tokens: int = 0
    best_valid_perplexity: float | None = None
    elapsed_s: float = 0.0


def resume_file(run: Path) -> Path:
    """Where a run folder keeps its resume point."""
    return run / "last" / "resume.safetensors"


def save_point(
    run: Path, position: Position, model: LanguageModel, optimizer: torch.optim.Optimizer, states: LayerStates
) -> None:
    """Writes the resume point, whole or not at all."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, slot in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in slot.items() if tensor is not None}
    for layer, state in enumerate(states):
        tensors |= {f"state.{layer}.{part}": tensor for part, tensor in enumerate(state)}
    tensors["random.cpu"] = torch.get_rng_state()
    if model.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(model.device)
    write_tensors(resume_file(run), tensors, {"position": json.dumps(asdict(position))})


def load_point(run: Path, model: LanguageModel, optimizer: torch.optim.Optimizer) -> tuple[Position, LayerStates]:
    """Puts model, optimiser and random states back; returns the position and the recurrent state.

    Raises:
        UnrolledError: the resume point is missing, damaged or of another run.
    """
    tensors, metadata = read_tensors(resume_file(run))
    try:
        return _put_back(tensors, metadata, model, optimizer)
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        raise UnrolledError(f"{resume_file(run)} does not fit the recipe of its run") from error


def _put_back(
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
) -> tuple[Position, LayerStates]:
    model.load_state_dict(_under("model.", tensors))
    slots: dict[int, dict[str, torch.Tensor]] = {}
    parameters = list(model.parameters())
    for name, tensor in _under("optimizer.", tensors).items():
        number, _, slot = name.partition(".")
        expected = () if slot == "step" else parameters[int(number)].shape
        if tensor.shape != expected or tensor.dtype != torch.float32:  # the fused step would write where it must not
            raise ValueError(name)
        slots.setdefault(int(number), {})[slot] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and model.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], model.device)
    parts = {name: tensor.to(model.device) for name, tensor in _under("state.", tensors).items()}
    states = tuple(
        tuple(parts[f"{layer}.{part}"] for part in range(len(state)))
        for layer, state in enumerate(model.initial_state(1))
    )
    return Position(**json.loads(metadata["position"])), states


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
