"""Texts of any lengths read side by side, each from a state of its own, a window at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from unrolled.nn.loss import token_nll
from unrolled.nn.model import LanguageModel
from unrolled.nn.unroll import LayerStates, join, pick

NOTHING = np.zeros(0, np.int64)
"""Targets of a text that is only read."""
Likeliest: TypeAlias = list[list[tuple[int, float]]]
_TEXTS_AT_ONCE, _STEPS_AT_ONCE, _TOKENS_AT_ONCE = 64, 128, 2048
_FIGURES_AT_ONCE = 1 << 23  # of logits, or of the hidden layers that wait to become some


@dataclass(frozen=True)
class Unread:
    """What is to be read of one text, and what to say of it."""

    ids: np.ndarray
    """(T,), read one after the other."""
    targets: np.ndarray
    """(S,), S at most T: what follows each of the first S ids, to be scored."""
    top: int = 0
    """How many of the likeliest tokens to name in the place of each target."""
    follows: bool = False
    """Whether to say how probable every token is after the last id; then there is at least one."""


def alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """The numbers of texts of such lengths, in groups to be read side by side: those of like length together."""
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    for first in range(0, len(order), _TEXTS_AT_ONCE):
        yield order[first : first + _TEXTS_AT_ONCE]


@final
class Reading:
    """Texts being read.

    Each step is one step of the model for all texts that have one left, none is padded: when the shortest ends, the
    rest go on without it. Under `torch.autocast` products are of bf16.

    Args:
        model: in evaluation mode.
        texts: N of them; those of like length are read together with the least waste.
        states: of all N; None for zero states.

    Attributes:
        nats: for each text, the negative log-likelihood (S,) of its targets.
        likeliest: for each text, as many lists of its `top` likeliest tokens, ids and log-probabilities, as targets.
        log_probs: (N, V) of what follows each text, where that was asked for, once all have been read.
        states: (N) after the last token of each; while the reading goes on, of those that go on.
    """

    def __init__(self, model: LanguageModel, texts: Sequence[Unread], states: LayerStates | None = None) -> None:
        self.model, self.texts = model, texts
        self.nats = [np.zeros(len(text.targets)) for text in texts]
        self.likeliest: list[Likeliest] = [[] for _ in texts]
        shape = len(texts) if any(text.follows for text in texts) else 0, model.vocab_size
        self.log_probs = torch.empty(shape, dtype=torch.float32, device="cpu")
        self.states = model.initial_state(len(texts)) if states is None else states
        self._going = sorted(range(len(texts)), key=lambda number: -len(texts[number].ids))
        self._order, self._ended, self._first = list(self._going), [], 0
        if self._going != sorted(self._going):
            self.states = pick(self.states, self._going)
        self._last = list[tuple[list[int], Tensor]]()
        self._unscored = list[tuple[Tensor, np.ndarray, list[tuple[int, int]]]]()
        self._scored = [0] * len(texts)
        self._part()

    @torch.inference_mode()
    def advance(self) -> bool:
        """Reads one more window; whether there is another."""
        if not self._going:
            return False
        texts = [self.texts[number] for number in self._going]
        end = min(len(texts[-1].ids), self._first + max(1, min(_STEPS_AT_ONCE, _TOKENS_AT_ONCE // len(texts))))
        window = np.stack([text.ids[self._first : end] for text in texts], axis=1)
        inputs = torch.from_numpy(window.astype(np.int64)).to(self.model.device)
        outputs, self.states = self.model.hidden(inputs, self.states)
        self._score(texts, outputs)
        self._first = end
        self._part(outputs[-1])
        waiting = sum(len(flat) for _, flat, _ in self._unscored)
        widest = max(self.model.vocab_size, outputs.shape[-1])
        if waiting and (not self._going or waiting * widest >= _FIGURES_AT_ONCE):
            self._decode()
        return bool(self._going)

    def finish(self) -> "Reading":
        """Reads all that is left."""
        while self.advance():
            pass
        return self

    def _score(self, texts: list[Unread], outputs: Tensor) -> None:
        """Nats of the targets after a window's steps; some windows together, for each time all the decoder is read."""
        targets = [text.targets[self._first : self._first + len(outputs)] for text in texts]
        counts = [len(values) for values in targets]
        if any(counts):
            rows = torch.cat([outputs[:count, column] for column, count in enumerate(counts)])
            self._unscored.append((rows, np.concatenate(targets), list(zip(self._going, counts, strict=True))))
        if any(text.top for text in texts):
            self._name(texts, outputs, counts)

    def _decode(self) -> None:
        """Scores what waits for it."""
        rows = torch.cat([rows for rows, _, _ in self._unscored])
        targets = torch.from_numpy(np.concatenate([flat for _, flat, _ in self._unscored]).astype(np.int64))
        nats = token_nll(rows, self.model.decoder, targets.to(rows.device)).double().cpu().numpy()
        for _, _, places in self._unscored:
            for number, count in places:
                done = self._scored[number]
                self.nats[number][done : done + count], nats = nats[:count], nats[count:]
                self._scored[number] += count
        self._unscored = []

    def _name(self, texts: list[Unread], outputs: Tensor, counts: list[int]) -> None:
        """The likeliest in the places of a window's targets."""
        for column, (text, count) in enumerate(zip(texts, counts, strict=True)):
            if text.top and count:
                values, ids = decoded(self.model, outputs[:count, column]).topk(min(text.top, self.model.vocab_size))
                rows = zip(ids.tolist(), values.tolist(), strict=True)
                self.likeliest[self._going[column]] += [list(zip(*row, strict=True)) for row in rows]

    def _part(self, last: Tensor | None = None) -> None:
        """Takes those out that have been read; `last` (n, H) is the model's output after their last token."""
        left = len(self._going)
        while left and len(self.texts[self._going[left - 1]].ids) == self._first:
            left -= 1
        if left < len(self._going):
            rows = [row for row in range(left, len(self._going)) if self.texts[self._going[row]].follows]
            if rows and last is not None:
                self._last.append(([self._going[row] for row in rows], last[rows]))
            self._ended.append(pick(self.states, slice(left, None)))
            self._going, self.states = self._going[:left], pick(self.states, slice(left))
        if not self._going and self._last:  # all at once: each time the whole decoder is read
            numbers = [number for several, _ in self._last for number in several]
            self.log_probs[numbers] = decoded(self.model, torch.cat([rows for _, rows in self._last])).cpu()
        if not self._going and self._ended:
            self.states = join(self._ended[::-1])
            if self._order != sorted(self._order):
                self.states = pick(self.states, np.argsort(self._order).tolist())


@torch.inference_mode()
def decoded(model: LanguageModel, hidden: Tensor) -> Tensor:
    """Log-probabilities in f32, whatever the precision of what came before."""
    with torch.autocast(model.device.type, enabled=False):
        return model.decoder(hidden.float()).log_softmax(-1)
