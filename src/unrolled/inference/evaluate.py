"""Perplexity of a text, by a protocol that is named: sum nats, sum counts, divide once.

A Jordan network can be fed its own output, as at test time, or the true previous token (`teacher_forced`); others take
no notice.

exact   One stream from the first target to the last, each counted once, the state carried throughout. The figure
        depends neither on the window length nor on how the work is batched inside.
paper   What the reference code does to its validation text: `batch_size` streams in windows of `num_steps`, the tail
        dropped. Its test is one token at a time, which is `exact`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unrolled.data.batches import Windows
from unrolled.nn.cells import teacher_forced as is_forced
from unrolled.nn.loss import bits_per, decoder_loss, perplexity
from unrolled.nn.model import LanguageModel
from unrolled.nn.unroll import LayerStates

_LOGITS_AT_ONCE = 1 << 22
_SEGMENT_TOKENS = 1_000
_SWEEPS = 4
_SAME_STATE = 1e-5


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of some tokens: the sum and the counts, from which every figure follows."""

    protocol: str
    tokens: int
    nll_nats: float

    @property
    def perplexity(self) -> float:
        """e to the mean nats per token."""
        return perplexity(self.nll_nats, self.tokens)

    @property
    def bits_per_token(self) -> float:
        """Mean bits per token."""
        return bits_per(self.nll_nats, self.tokens)


@torch.inference_mode()
def evaluate_paper(model: LanguageModel, windows: Windows, teacher_forced: bool = False) -> Evaluation:
    """The targets of `windows`, the state zero at the start and carried from one to the next; their tail is dropped."""
    model.eval()
    state, nll_nats, tokens = model.initial_state(len(windows.streams)), 0.0, 0
    with is_forced(teacher_forced):
        for inputs, targets in windows:
            nll, count, state = model.nll(inputs.to(model.device), targets.to(model.device), state)
            nll_nats += nll.item()
            tokens += count
    return Evaluation("paper", tokens, nll_nats)


@torch.inference_mode()
def evaluate_exact(
    model: LanguageModel,
    ids: np.ndarray,
    batch_size: int = 32,
    num_steps: int | None = None,
    teacher_forced: bool = False,
) -> Evaluation:
    """One stream over `ids` (N,): N - 1 targets, each with all that comes before it as its context.

    The stream is cut into `batch_size` segments that run side by side. A segment ought to begin in the state that the
    one before it ends in; at first that is what the last 1,000 tokens alone lead to, and the sweep is repeated from the
    states that came out until they no longer change. A recurrent model forgets, so one sweep nearly always does, and
    where four do not, one stream is run token after token. `batch_size=1` is that plain way.

    Args:
        model: put in evaluation mode.
        ids: (N,), any integer type, N at least 2.
        batch_size: the most segments; texts below 1,000 tokens a segment take fewer.
        num_steps: tokens at a time; None fits it to the memory for logits.
        teacher_forced: for a Jordan network.

    Raises:
        ValueError: there is no target.
    """
    targets = len(ids) - 1
    if targets < 1:
        raise ValueError("an evaluation takes two tokens or more")
    model.eval()
    segments = max(1, min(batch_size, targets // _SEGMENT_TOKENS))
    steps = num_steps or min(128, max(1, _LOGITS_AT_ONCE // (segments * model.vocab_size)))
    with is_forced(teacher_forced):
        return Evaluation("exact", targets, _exact_nats(model, ids, segments, steps))


def _exact_nats(model: LanguageModel, ids: np.ndarray, segments: int, num_steps: int) -> float:
    begin = _following(_ends(model, ids, segments, num_steps))
    for _ in range(min(segments, _SWEEPS)):
        nll_nats, end = _sweep(model, ids, begin, segments, num_steps)
        follow = _following(end)
        if _near(begin, follow):
            return nll_nats
        begin = follow
    nll_nats, _ = _sweep(model, ids, model.initial_state(1), 1, num_steps)
    return nll_nats


def _sweep(
    model: LanguageModel, ids: np.ndarray, states: LayerStates, segments: int, num_steps: int
) -> tuple[float, LayerStates]:
    """Nats of all targets, segment b of them from the b-th state on; and the states at the segments' ends."""
    nll_nats = 0.0
    for inputs, targets, counted in _windows(ids, segments, num_steps, model.device):
        outputs, states = model.hidden(inputs, states)
        if not counted.all():
            outputs, targets = outputs[counted], targets[counted]
        nll, _ = decoder_loss(outputs, model.decoder, targets)
        nll_nats += nll.item()
    return nll_nats, states


def _ends(model: LanguageModel, ids: np.ndarray, segments: int, num_steps: int) -> LayerStates:
    """Nearly the states at the segments' ends: those that their last tokens lead to from zero."""
    states = model.initial_state(segments)
    if segments > 1:
        for inputs, _, _ in _windows(ids, segments, num_steps, model.device, _SEGMENT_TOKENS):
            _, states = model.hidden(inputs, states)
    return states


def _windows(
    ids: np.ndarray, segments: int, num_steps: int, device: torch.device, last: int | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs and targets, each (T, B), and on the CPU whether a target counts, for the last segment is shorter; of all
    of each segment, or the `last` tokens."""
    targets = len(ids) - 1
    length = -(-targets // segments)
    starts = np.arange(segments) * length
    for first in range(max(0, length - last) if last else 0, length, num_steps):
        offsets = np.arange(first, min(first + num_steps, length) + 1)[:, None]  # (T + 1, 1)
        positions = starts + offsets  # (T + 1, B)
        window = torch.from_numpy(ids[np.minimum(positions, targets)].astype(np.int64)).to(device)
        yield window[:-1], window[1:], torch.from_numpy(positions[1:] <= targets)


def _following(end: LayerStates) -> LayerStates:
    """Each segment begins where the one before it ended; the first in zero."""

    def shifted(tensor: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(tensor[:1]), tensor[:-1]])

    return tuple(tuple(shifted(tensor) for tensor in state) for state in end)


def _near(a: LayerStates, b: LayerStates) -> bool:
    pairs = [(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)]
    return all(torch.allclose(x, y, rtol=_SAME_STATE, atol=_SAME_STATE) for x, y in pairs)


def ngram_perplexity(train_ids: np.ndarray, ids: np.ndarray, vocab_size: int, n: int) -> float:
    """Perplexity of the targets `ids[1:]` under the n-grams of the training text, one added to each count: a yardstick.

    A target is predicted from the n - 1 ids before it, or as many as there are from ids[0] on. Takes V**n counts.
    """
    nll_nats = 0.0
    for order in range(2, n):  # the target with order - 1 ids before it
        nll_nats += _ngram_nats(train_ids, ids[:order], vocab_size, order)
    nll_nats += _ngram_nats(train_ids, ids[n == 1 :], vocab_size, n)
    return perplexity(nll_nats, len(ids) - 1)


def _ngram_nats(train_ids: np.ndarray, ids: np.ndarray, vocab_size: int, n: int) -> float:
    counts = _ngram_counts(train_ids, vocab_size, n) + 1
    log_probs = np.log(counts / counts.sum(axis=-1, keepdims=True))
    return -float((_ngram_counts(ids, vocab_size, n) * log_probs).sum())


def _ngram_counts(ids: np.ndarray, vocab_size: int, n: int) -> np.ndarray:
    """How often each n ids stand in a row, (V**(n - 1), V); in blocks, for the text may not fit in memory."""
    counts = np.zeros(vocab_size**n, np.int64)
    for first in range(0, len(ids) - n + 1, 1 << 20):
        block = ids[first : first + (1 << 20) + n - 1].astype(np.int64)
        numbers = sum(block[place : len(block) - n + 1 + place] * vocab_size ** (n - 1 - place) for place in range(n))
        counts += np.bincount(numbers, minlength=len(counts))
    return counts.reshape(-1, vocab_size)
