"""Several processes that train one model, as `torchrun` starts them, and what they exchange.

Each of W processes (ranks) carries its share of the B streams through the same windows. Nats, counts and gradients are
summed over them, and every one takes the same step, so that together they go where one process goes, to rounding; only
under dropout each drops units of its own. The first alone validates and writes. A resume point holds the states of all
streams, whoever carried them: another number of processes may go on from it.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import final

import torch
from torch import Tensor, distributed, nn

from unrolled.errors import UnrolledError
from unrolled.run import pick_device

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_TRAININGS = count()
_MEETING, _WAITING = timedelta(minutes=5), timedelta(days=1)  # the others wait while the first validates


@final
class Ranks:
    """This process among those that train together.

    Args:
        rank: from 0, the first.
        world: W, how many there are. What one alone exchanges with others is what it had.
        device: where tensors are exchanged.
    """

    def __init__(self, rank: int = 0, world: int = 1, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008
        self.rank, self.world, self.device = rank, world, device

    @property
    def is_first(self) -> bool:
        """Whether this is the one that validates, writes and reports."""
        return self.rank == 0

    def streams(self, batch_size: int) -> slice:
        """Which of so many streams are this one's.

        Raises:
            UnrolledError: there are fewer streams than processes.
        """
        if batch_size < self.world:
            raise UnrolledError(f"{self.world} processes take --training.batch-size {self.world} or more")
        return slice(batch_size * self.rank // self.world, batch_size * (self.rank + 1) // self.world)

    def sum(self, *values: float) -> tuple[float, ...]:
        """Each of the values, summed over all."""
        if self.world == 1:
            return values
        # f64 on every device that trains here; counts are exact in it
        return tuple(self._summed(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist())

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each of the flags, whether it is set anywhere."""
        return tuple(number > 0 for number in self.sum(*flags))

    def join(self, rows: Tensor) -> Tensor:
        """rows (N, …), N its own for each -> those of all, (the sum of N, …), in the order of ranks."""
        if self.world == 1:
            return rows
        counts = [0.0] * self.world
        counts[self.rank] = len(rows)
        counts = [int(count) for count in self.sum(*counts)]
        place = sum(counts[: self.rank])
        joined = torch.zeros(sum(counts), *rows.shape[1:], dtype=rows.dtype, device=self.device)
        joined[place : place + len(rows)] = rows
        return self._summed(joined).to(rows.device)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every gradient becomes the sum over all; a sparse one that of all rows, one rank's after another's."""
        if self.world == 1:
            return
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                ids, rows = self.join(gradient._indices()[0]), self.join(gradient._values())
                parameter.grad = torch.sparse_coo_tensor(ids.unsqueeze(0), rows, gradient.shape, check_invariants=False)
            else:
                parameter.grad = self._summed(gradient.contiguous())

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """The first one's values take the place of all others'."""
        if self.world > 1:
            for tensor in tensors:
                with _exchange(), torch.no_grad():
                    distributed.broadcast(tensor, 0)

    def told(self, text: str) -> str:
        """What the first one says."""
        if self.world == 1:
            return text
        own = torch.tensor(list(text.encode()), dtype=torch.uint8)
        return bytes(self.join(own if self.is_first else own[:0]).tolist()).decode()

    def wait(self) -> None:
        """Until all have come here."""
        self.sum(0)

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """The others enter when the first has left: what it has prepared is there."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def _summed(self, tensor: Tensor) -> Tensor:
        with _exchange():
            distributed.all_reduce(tensor)
        return tensor


ALONE = Ranks()


def launched_rank() -> int | None:
    """Which of those that `torchrun` started this process is; None where there are none."""
    return int(os.environ["RANK"]) if _is_launched() else None


@contextmanager
def joined_ranks(name: str) -> Iterator[tuple[Ranks, torch.device]]:
    """This process among those that `torchrun` started, and its device; alone where there are none.

    Args:
        name: of the device, the recipe's. Where it is a GPU without a number, each process of a machine takes its own.

    Raises:
        UnrolledError: there is no such device, or the others do not come.
    """
    if not _is_launched():
        yield ALONE, pick_device(name)
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if name.startswith("cuda:") and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise UnrolledError(f"{name} is one GPU; with --device cuda each process takes its own")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(name)
    gpu = device if device.type == "cuda" else None
    if gpu:
        torch.cuda.set_device(gpu)
    try:
        store, _, _ = next(distributed.rendezvous("env://", rank, world, timeout=_MEETING))
        store.set_timeout(_WAITING)
        # lest a second training finds what the first has left there
        store = distributed.PrefixStore(f"unrolled/{next(_TRAININGS)}", store)
        backend = "nccl" if gpu else "gloo"
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=_WAITING, device_id=gpu
        )
    except (RuntimeError, ValueError) as error:
        raise UnrolledError(f"the {world} processes of this training do not find each other: {error}") from error
    try:
        yield Ranks(rank, world, device), device
    finally:
        distributed.destroy_process_group()


def _is_launched() -> bool:
    return all(name in os.environ for name in _VARIABLES) and os.environ["WORLD_SIZE"] != "1"


@contextmanager
def _exchange() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[[^\]]*\] ", "", str(error)).partition(". ")[0].partition("\n")[0]
        raise UnrolledError(
            f"another process of this training has ended, or cannot be reached ({reason}); "
            "unrolled train --resume goes on from the last save, if there is one"
        ) from error
