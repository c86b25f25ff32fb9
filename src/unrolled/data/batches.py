"""ids -> B parallel streams -> (T, B) windows.

The text is laid out as B streams side by side; a window is the next T rows of all of them. The model carries its
state from one window to the next, so stream b of window k+1 continues stream b of window k:

    ids       0 1 2 3 4 5 6 7 8 9 10 11 12 13      B = 2, T = 3
    stream 0  0 1 2 3 4 5 6                        window 0  inputs 0 1 2 / 7 8 9       targets 1 2 3 / 8 9 10
    stream 1  7 8 9 10 11 12 13                    window 1  inputs 3 4 5 / 10 11 12    targets 4 5 6 / 11 12 13

Ids that do not fill a whole row of streams or a whole last window are dropped, as the reference reader does
(TensorFlow's PTB tutorial, `ptb_producer`).
"""

from collections.abc import Iterator
from copy import copy
from typing import final

import numpy as np
import torch
from torch import Tensor

from unrolled.errors import UnrolledError

_IDS_AT_ONCE = 1 << 15


@final
class Windows:
    """The windows of one pass over `ids`, by number or in order.

    `windows[k]` is `(inputs, targets)`, each (T, B) int64, targets one position on. The cursor is the caller's: a
    pass broken off after window k goes on with `windows.since(k + 1)`. Only what is asked for is read, so memory-mapped
    ids stay on the disk.

    Args:
        ids: (N,), any integer type.
        batch_size: B, the number of parallel streams.
        num_steps: T, the length of a window.

    Raises:
        UnrolledError: there are too few ids for a single window.
    """

    def __init__(self, ids: np.ndarray, batch_size: int, num_steps: int) -> None:
        length = len(ids) // batch_size
        self.streams = ids[: length * batch_size].reshape(batch_size, length)  # (B, N // B), a view
        self.num_steps = num_steps
        self.num_windows = (length - 1) // num_steps
        if self.num_windows < 1:
            need = batch_size * (num_steps + 1)
            raise UnrolledError(
                f"{len(ids):,} tokens are too few for {batch_size} streams in windows of {num_steps} steps, which take "
                f"at least {need:,}; lower --training.batch-size or --training.num-steps, or give more text"
            )

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.num_windows:
            raise IndexError(f"window {index} of {self.num_windows}")
        columns = self._columns(index, index + 1)
        return columns[:-1], columns[1:]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.since(0)

    def since(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The windows from number `index` to the last, made some at a time: it takes little longer than one alone."""
        steps, together = self.num_steps, max(1, _IDS_AT_ONCE // (len(self.streams) * self.num_steps))
        for begin in range(index, self.num_windows, together):
            columns = self._columns(begin, min(begin + together, self.num_windows))
            for first in range(0, len(columns) - 1, steps):
                yield columns[first : first + steps], columns[first + 1 : first + 1 + steps]

    def _columns(self, begin: int, end: int) -> Tensor:
        """Inputs and targets of the windows from `begin` up to `end`, ((end - begin) T + 1, B)."""
        rows = self.streams[:, begin * self.num_steps : end * self.num_steps + 1].astype(np.int64)
        return torch.from_numpy(rows).t().contiguous()

    def part(self, streams: slice) -> "Windows":
        """The same windows of some of the streams."""
        part = copy(self)
        part.streams = self.streams[streams]
        return part

    @property
    def targets(self) -> np.ndarray:
        """All targets of one pass, (B, T * windows), a view."""
        return self.streams[:, 1 : 1 + self.num_windows * self.num_steps]

    @property
    def num_targets(self) -> int:
        """How many targets one pass counts."""
        return self.targets.size
