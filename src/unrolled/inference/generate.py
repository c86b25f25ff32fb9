"""The likeliest next tokens after a text, and texts continued."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unrolled.data.tokens import Tokenizer
from unrolled.errors import UnrolledError
from unrolled.inference.sampling import Sampling, Writer
from unrolled.nn.model import LanguageModel
from unrolled.nn.stream import Stream
from unrolled.nn.unroll import LayerStates

_STEPS_AT_ONCE = 256
_PREFIXES_AT_ONCE = 64
MOST_SAMPLES = 1024


@dataclass(frozen=True)
class Prediction:
    """The likeliest next tokens after `prefix`: pairs of token and probability, by falling probability."""

    prefix: str
    words: list[tuple[str, float]]


@torch.inference_mode()
def read_prefix(model: LanguageModel, tokenizer: Tokenizer, text: str) -> tuple[Tensor, LayerStates]:
    """What follows a text that begins a line: log-probabilities (V,) of the next token, and the state (B = 1)."""
    ids = np.concatenate([[tokenizer.start_id], tokenizer.encode(text)]).astype(np.int64)
    inputs = torch.from_numpy(ids).unsqueeze(1).to(model.device)  # (T, 1)
    state = model.initial_state(1)
    *windows, last = inputs.split(_STEPS_AT_ONCE)
    for window in windows:
        _, state = model.hidden(window, state)
    outputs, state = model.hidden(last, state)
    return _decoded(model, outputs[-1, 0]), state


@torch.inference_mode()
def predict_many(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prefixes: Sequence[str],
    k: int = 10,
    unknown: bool = False,
    complete: bool = False,
) -> list[Prediction]:
    """The k likeliest tokens after each prefix, with the model's own probabilities; the prefixes are read side by side.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        prefixes: beginnings of lines; "" asks what begins one.
        k: how many; no more than there are.
        unknown: whether `<unk>` may be among them. Leaving it out does not raise the others' probabilities.
        complete: of a prefix that does not end in white space the last word is still being typed: only words that begin
            with it are named, in its place, their probabilities given that it is one of them.

    Raises:
        UnrolledError: k is less than 1, a prefix is not in the model's vocabulary and it has no `<unk>`, or words are
            to be completed by a model of other tokens.
    """
    if k < 1:
        raise UnrolledError(f"k must be at least 1, not {k}")
    if complete and tokenizer.unit != "word":
        raise UnrolledError(f"only a model of words completes them; this one is of {tokenizer.unit}s")
    typed = [_last_word(prefix) if complete else "" for prefix in prefixes]
    before = [prefix[: len(prefix) - len(word)] for prefix, word in zip(prefixes, typed, strict=True)]
    found = []
    for prefix, word, log_probs in zip(prefixes, typed, _after(model, tokenizer, before), strict=True):
        if not unknown and tokenizer.unknown_id is not None:
            log_probs[tokenizer.unknown_id] = -torch.inf
        if word:
            log_probs[[not token.startswith(word) for token in tokenizer.vocabulary]] = -torch.inf
            log_probs -= log_probs.logsumexp(-1)
        values, ids = log_probs.topk(min(k, len(tokenizer)))
        pairs = zip(ids.tolist(), values.exp().tolist(), strict=True)
        found.append(Prediction(prefix, [(tokenizer.token(id), value) for id, value in pairs if value > 0]))
    return found


def _last_word(text: str) -> str:
    return "" if not text or text[-1].isspace() else text.split()[-1]


def _after(model: LanguageModel, tokenizer: Tokenizer, prefixes: Sequence[str]) -> Tensor:
    """Log-probabilities (N, V) of what follows each prefix; those of like length are read together."""
    ids = [np.concatenate([[tokenizer.start_id], tokenizer.encode(prefix)]).astype(np.int64) for prefix in prefixes]
    rows = torch.empty(len(ids), len(tokenizer))
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    for first in range(0, len(order), _PREFIXES_AT_ONCE):
        chosen = order[first : first + _PREFIXES_AT_ONCE]
        lengths = np.array([len(ids[number]) for number in chosen])
        padded = np.zeros((lengths.max(), len(chosen)), np.int64)
        for column, number in enumerate(chosen):
            padded[: lengths[column], column] = ids[number]
        states = model.initial_state(len(chosen))
        for begin in range(0, len(padded), _STEPS_AT_ONCE):
            window = torch.from_numpy(padded[begin : begin + _STEPS_AT_ONCE]).to(model.device)
            outputs, states = model.hidden(window, states)
            ending = np.flatnonzero((begin < lengths) & (lengths <= begin + len(window)))
            if len(ending):
                last = outputs[lengths[ending] - 1 - begin, ending]
                rows[[chosen[column] for column in ending]] = _decoded(model, last).cpu()
    return rows


def _decoded(model: LanguageModel, hidden: Tensor) -> Tensor:
    """Log-probabilities in f32, whatever the precision of what came before."""
    with torch.autocast(model.device.type, enabled=False):
        return model.decoder(hidden.float()).log_softmax(-1)


@torch.inference_mode()
def continuations(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prefix: str = "",
    length: int = 3,
    k: int = 5,
    width: int = 20,
    unknown: bool = False,
) -> list[tuple[str, float]]:
    """The likeliest texts of `length` tokens after `prefix` that a beam search finds, with their log-probabilities.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        prefix: the beginning of a line.
        length: tokens of each.
        k: how many.
        width: of the beam; as wide as the vocabulary to the power of `length - 1` it misses nothing.
        unknown: whether `<unk>` may be among the tokens.

    Raises:
        UnrolledError: an option is out of bounds, or the prefix is not in the vocabulary of a model without `<unk>`.
    """
    for name, value, most in (("length", length, 1_000), ("k", k, width), ("width", width, MOST_SAMPLES)):
        if not 1 <= value <= most:
            raise UnrolledError(f"{name} must be from 1 to {most}, not {value}")
    mask = Sampling(unknown=unknown).mask(tokenizer)
    log_probs, state = read_prefix(model, tokenizer, prefix)
    stream, totals = Stream(model, state), torch.zeros(1)
    rows, sequences = log_probs.cpu().unsqueeze(0), torch.zeros(1, 0, dtype=torch.int64)
    for number in range(length):
        joint = (totals.unsqueeze(-1) + rows + mask).flatten()
        totals, places = joint.topk(min(width, int(joint.isfinite().sum())))
        parents, ids = places // len(tokenizer), places % len(tokenizer)
        sequences = torch.cat([sequences[parents], ids.unsqueeze(-1)], dim=-1)
        if number < length - 1:
            stream.pick(parents.to(model.device))
            rows = stream.read(ids.to(model.device)).cpu()
    read, found = tokenizer.encode(prefix).tolist(), []
    for sequence, total in zip(sequences[:k].tolist(), totals[:k].tolist(), strict=True):
        decode = tokenizer.decoder()
        for id in read:
            decode(id)
        found.append(("".join(map(decode, sequence)), total))
    return found


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    length: int = 100,
    seed: int | None = None,
    random_start: bool = False,
    stop: tuple[str, ...] = (),
    **sampling: Any,
) -> Iterator[str]:
    """Draws up to `length` tokens after `prompt`; yields the text that each adds, as it is drawn.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        prompt: the beginning of a line; "" begins a new one.
        length: tokens to draw.
        seed: of the draw; the same seed gives the same text. None takes a new one.
        random_start: in place of a prompt, the first token is drawn from all alike and read from the zero state.
        stop: the text ends before the first of these that is written.
        sampling: fields of `Sampling`.

    Raises:
        UnrolledError: an option is out of bounds, or the prompt is not in the vocabulary of a model without `<unk>`.
    """
    pieces = _drawn(model, tokenizer, prompt, length, seed, random_start, stop, Sampling(**sampling), samples=1)
    return (piece for (piece,) in pieces)


def generate_many(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    samples: int = 2,
    length: int = 100,
    seed: int | None = None,
    random_start: bool = False,
    stop: tuple[str, ...] = (),
    **sampling: Any,
) -> list[str]:
    """Several texts after one prompt, drawn side by side; the arguments are `generate`'s."""
    pieces = _drawn(model, tokenizer, prompt, length, seed, random_start, stop, Sampling(**sampling), samples)
    return ["".join(parts) for parts in zip(*pieces, strict=True)] or [""] * samples


def sample(model: LanguageModel, tokenizer: Tokenizer, length: int, seed: int) -> str:
    """A text of `length` tokens, drawn from the distribution as it is.

    Characters begin with a random one. A random word is nearly always one that hardly occurs, after which a model may
    never find back to what it knows; so words, and pieces of them, begin a line.
    """
    unknown, random_start = len(tokenizer) == 1, tokenizer.unit in ("character", "byte")
    return "".join(generate(model, tokenizer, length=length, seed=seed, unknown=unknown, random_start=random_start))


def new_seed() -> int:
    """A seed for a draw whose user named none."""
    return random.SystemRandom().randrange(1 << 32)


def _drawn(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    length: int,
    seed: int | None,
    random_start: bool,
    stop: tuple[str, ...],
    sampling: Sampling,
    samples: int,
) -> Iterator[tuple[str, ...]]:
    """What each token adds to each of so many texts. All that can be wrong is said before the first is drawn."""
    if length < 0:
        raise UnrolledError(f"length must be at least 0, not {length}")
    if not 1 <= samples <= MOST_SAMPLES:
        raise UnrolledError(f"samples must be from 1 to {MOST_SAMPLES}, not {samples}")
    if seed is not None and not 0 <= seed < 1 << 63:
        raise UnrolledError(f"seed must be at least 0 and below 2 to the 63rd, not {seed}")
    if random_start and prompt:
        raise UnrolledError("--random-start and a prompt exclude each other")
    mask, source = sampling.mask(tokenizer), torch.Generator().manual_seed(new_seed() if seed is None else seed)
    log_probs, state = (None, model.initial_state(1)) if random_start else read_prefix(model, tokenizer, prompt)
    stream = Stream(model, tuple(tuple(part.repeat(samples, 1) for part in layer) for layer in state))
    read = tokenizer.encode(prompt).tolist()
    return _texts(stream, tokenizer, read, mask, log_probs, length, stop, sampling, source, samples)


def _texts(
    stream: Stream,
    tokenizer: Tokenizer,
    read: list[int],
    mask: Tensor,
    log_probs: Tensor | None,
    length: int,
    stop: tuple[str, ...],
    sampling: Sampling,
    source: torch.Generator,
    samples: int,
) -> Iterator[tuple[str, ...]]:
    before, writers = torch.zeros(samples, len(tokenizer), dtype=torch.bool), []
    before[:, read] = True
    for _ in range(samples):
        decode = tokenizer.decoder()
        for id in read:  # so that the text goes on where the prompt ends
            decode(id)
        writers.append(Writer(decode, stop))
    rows = None if log_probs is None else log_probs.cpu().expand(samples, -1)
    for number in range(length):
        if rows is None:  # the first token of a random start, drawn from all alike
            ids = [Sampling().draw(mask, source) for _ in writers]
        else:
            ids = [sampling.draw(row + mask, source, seen) for row, seen in zip(rows, before, strict=True)]
        pieces = [writer.write(id) for writer, id in zip(writers, ids, strict=True)]
        ended = number == length - 1 or all(writer.done for writer in writers)
        yield tuple(p + writer.rest() if ended else p for p, writer in zip(pieces, writers, strict=True))
        if ended:
            return
        before[range(samples), ids] = True
        rows = stream.read(torch.tensor(ids, device=stream.model.device)).cpu()
