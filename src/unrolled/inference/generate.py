"""The likeliest next tokens after a text, and texts continued."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from unrolled.data.tokens import Tokenizer
from unrolled.errors import UnrolledError
from unrolled.inference.reading import NOTHING, Reading, Unread, alike
from unrolled.inference.sampling import Sampling, Writer
from unrolled.inference.shown import prediction_html
from unrolled.nn.model import LanguageModel
from unrolled.nn.stream import Stream
from unrolled.nn.unroll import LayerStates, pick

_DECODER_REMEMBERS = 8
"""Tokens: of words whether the last ended a line, of bytes the beginning of a character."""
MOST_SAMPLES, MOST_WORDS = 1024, 1_000


@dataclass(frozen=True)
class Prediction:
    """The likeliest next tokens after `prefix`: pairs of token and probability, by falling probability."""

    prefix: str
    words: list[tuple[str, float]]

    def _repr_html_(self) -> str:
        return prediction_html(self.prefix, self.words)


def prefix_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids (T + 1,) of a text that begins a line, after the end of the line before it.

    Raises:
        UnrolledError: something is not in the vocabulary of a tokenizer without `<unk>`.
    """
    return np.concatenate([[tokenizer.start_id], tokenizer.encode(text)]).astype(np.int64)


def read_prefix(model: LanguageModel, ids: np.ndarray) -> tuple[Tensor, LayerStates]:
    """After ids (T,): the log-probabilities (V,) of the next token, and the state (B = 1)."""
    reading = Reading(model, [Unread(ids, NOTHING, follows=True)]).finish()
    return reading.log_probs[0], reading.states


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
    if isinstance(prefixes, str):
        raise TypeError("predict_many takes several texts; predict takes one")
    asked = [Question(tokenizer, prefix, k, unknown, complete) for prefix in prefixes]
    found: dict[int, Prediction] = {}
    for chosen in alike([len(question.ids) for question in asked]):
        reading = Reading(model, [Unread(asked[number].ids, NOTHING, follows=True) for number in chosen]).finish()
        found |= {number: asked[number].answer(row) for number, row in zip(chosen, reading.log_probs, strict=True)}
    return [found[number] for number in range(len(asked))]


@final
class Question:
    """What comes next? To be asked of the log-probabilities after `ids`; the arguments are `predict_many`'s."""

    def __init__(
        self, tokenizer: Tokenizer, prefix: str, k: int, unknown: bool = False, complete: bool = False
    ) -> None:
        if k < 1:
            raise UnrolledError(f"k must be at least 1, not {k}")
        if complete and tokenizer.unit != "word":
            raise UnrolledError(f"only a model of words completes them; this one is of {tokenizer.unit}s")
        self.tokenizer, self.prefix, self.k, self.unknown = tokenizer, prefix, k, unknown
        self.word = last_word(prefix) if complete else ""
        self.ids = prefix_ids(tokenizer, prefix[: len(prefix) - len(self.word)])

    def answer(self, log_probs: Tensor) -> Prediction:
        """From the log-probabilities (V,) of the next token, which are left as they are."""
        tokenizer, log_probs = self.tokenizer, log_probs.clone()
        if not self.unknown and tokenizer.unknown_id is not None:
            log_probs[tokenizer.unknown_id] = -torch.inf
        if self.word:
            log_probs[[not token.startswith(self.word) for token in tokenizer.vocabulary]] = -torch.inf
            log_probs -= log_probs.logsumexp(-1)
        values, ids = log_probs.topk(min(self.k, len(tokenizer)))
        pairs = zip(ids.tolist(), values.exp().tolist(), strict=True)
        return Prediction(self.prefix, [(tokenizer.token(id), value) for id, value in pairs if value > 0])


def next_token(tokenizer: Tokenizer, k: int = 10, unknown: bool = False, typed: str = "") -> Question:
    """What comes after all that was read? The word that `typed` begins has not been read.

    Raises:
        UnrolledError: as `predict_many`, or `typed` is more than a word.
    """
    if any(map(str.isspace, typed)):
        raise UnrolledError(f"a word that is being typed holds no white space, as {typed!r} does")
    return Question(tokenizer, typed, k, unknown, complete=bool(typed))


def last_word(text: str) -> str:
    """The word that is still being typed; "" after white space."""
    return "" if not text or text[-1].isspace() else text.split()[-1]


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
    beam = Beam(tokenizer, prefix, length, k, width, unknown)
    *_, found = beam.through(model, *read_prefix(model, beam.prefix_ids))
    return found


@final
class Beam:
    """A beam search; the arguments are those of `continuations`."""

    def __init__(
        self, tokenizer: Tokenizer, prefix: str, length: int, k: int, width: int, unknown: bool = False
    ) -> None:
        for name, value, most in (("length", length, MOST_WORDS), ("k", k, width), ("width", width, MOST_SAMPLES)):
            if not 1 <= value <= most:
                raise UnrolledError(f"{name} must be from 1 to {most}, not {value}")
        self.tokenizer, self.length, self.k, self.width = tokenizer, length, k, width
        self.mask = Sampling(unknown=unknown).mask(tokenizer)
        self.prefix_ids = prefix_ids(tokenizer, prefix)

    @torch.inference_mode()
    def through(
        self, model: LanguageModel, log_probs: Tensor, states: LayerStates
    ) -> Iterator[list[tuple[str, float]]]:
        """From log-probabilities (V,) and the state (B = 1) after the prefix; yields what is found after each token."""
        stream, totals = Stream(model, states), torch.zeros(1, dtype=torch.float32, device="cpu")
        rows, sequences = log_probs.cpu().unsqueeze(0), torch.zeros(1, 0, dtype=torch.int64, device="cpu")
        for number in range(self.length):
            joint = (totals.unsqueeze(-1) + rows + self.mask).flatten()
            totals, places = joint.topk(min(self.width, int(joint.isfinite().sum())))
            parents, ids = places // len(self.tokenizer), places % len(self.tokenizer)
            sequences = torch.cat([sequences[parents], ids.unsqueeze(-1)], dim=-1)
            if number < self.length - 1:
                stream.states = pick(stream.states, parents.to(model.device))
                rows = stream.read(ids.to(model.device)).cpu()
            yield [
                ("".join(map(going_on(self.tokenizer, self.prefix_ids), sequence)), total)
                for sequence, total in zip(sequences[: self.k].tolist(), totals[: self.k].tolist(), strict=True)
            ]


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    length: int = 100,
    seed: int | None = None,
    random_start: bool = False,
    stop: str | tuple[str, ...] = (),
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
    drawing = Drawing(tokenizer, prompt, 1, length, seed, random_start, stop, Sampling(**sampling))
    return (piece for (piece,) in drawing.through(model))


def generate_many(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    samples: int = 2,
    length: int = 100,
    seed: int | None = None,
    random_start: bool = False,
    stop: str | tuple[str, ...] = (),
    **sampling: Any,
) -> list[str]:
    """Several texts after one prompt, drawn side by side; the arguments are `generate`'s."""
    return Drawing(tokenizer, prompt, samples, length, seed, random_start, stop, Sampling(**sampling)).texts(model)


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


def going_on(tokenizer: Tokenizer, ids: np.ndarray) -> Callable[[int], str]:
    """The tokenizer's decoder, as it is after the text that these ids end."""
    decode = tokenizer.decoder()
    for id in ids[1:][-_DECODER_REMEMBERS:].tolist():
        decode(id)
    return decode


@final
class Drawing:
    """Texts after one prompt, drawn side by side a token of each at a time. All that can be wrong is said at once.

    Args:
        tokenizer: the model's.
        prompt, length, seed, random_start, stop: as `generate`.
        after: ids (T,) that were read in place of a prompt, or the last of them.
        samples: how many texts.
        sampling: how tokens are drawn.

    Attributes:
        ids: the tokens drawn last, one for each text.
        tokens: how many were drawn of each text.
        done: whether no text goes on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        samples: int,
        length: int,
        seed: int | None,
        random_start: bool,
        stop: str | tuple[str, ...],
        sampling: Sampling,
        after: np.ndarray | None = None,
    ) -> None:
        if length < 0:
            raise UnrolledError(f"length must be at least 0, not {length}")
        if not 1 <= samples <= MOST_SAMPLES:
            raise UnrolledError(f"samples must be from 1 to {MOST_SAMPLES}, not {samples}")
        if seed is not None and not 0 <= seed < 1 << 63:
            raise UnrolledError(f"seed must be at least 0 and below 2 to the 63rd, not {seed}")
        if random_start and prompt:
            raise UnrolledError("a random start and a prompt exclude each other")
        self.length, self.random_start, self.sampling, self.mask = (
            length,
            random_start,
            sampling,
            sampling.mask(tokenizer),
        )
        self.source = torch.Generator().manual_seed(new_seed() if seed is None else seed)
        self.prompt_ids = prefix_ids(tokenizer, prompt) if after is None else after
        self.ids: list[int] = []
        self.tokens, self.done = [0] * samples, length == 0
        self._before: list[Tensor | None] = [None] * samples
        if sampling.repetition_penalty > 1:
            before = torch.zeros(samples, len(tokenizer), dtype=torch.bool, device="cpu")
            before[:, self.prompt_ids[1:]] = True
            self._before = list(before)
        stops = (stop,) if isinstance(stop, str) else stop
        self.writers = [Writer(going_on(tokenizer, self.prompt_ids), stops) for _ in range(samples)]

    def draw(self, log_probs: Tensor | None) -> tuple[str, ...]:
        """One more token of each text from their log-probabilities (B, V), None for all alike: what each adds."""
        if log_probs is None:
            self.ids = [Sampling().draw(self.mask, self.source) for _ in self.writers]
        else:
            rows = zip(log_probs, self._before, strict=True)
            self.ids = [self.sampling.draw(row + self.mask, self.source, before) for row, before in rows]
        for before, id in zip(self._before, self.ids, strict=True):
            if before is not None:
                before[id] = True
        self.tokens = [n + (not writer.done) for n, writer in zip(self.tokens, self.writers, strict=True)]
        pieces = [writer.write(id) for writer, id in zip(self.writers, self.ids, strict=True)]
        self.done = max(self.tokens) == self.length or all(writer.done for writer in self.writers)
        return tuple(p + writer.rest() if self.done else p for p, writer in zip(pieces, self.writers, strict=True))

    @torch.inference_mode()
    def begin(self, model: LanguageModel) -> tuple[Tensor | None, LayerStates]:
        """What `draw` takes first (B, V), and the states (B) after the prompt."""
        samples = [0] * len(self.writers)
        if self.random_start:
            return None, pick(model.initial_state(1), samples)
        log_probs, states = read_prefix(model, self.prompt_ids)
        return log_probs.expand(len(samples), -1), pick(states, samples)

    def texts(self, model: LanguageModel) -> list[str]:
        """All that is drawn after the prompt."""
        return ["".join(parts) for parts in zip(*self.through(model), strict=True)] or [""] * len(self.writers)

    def through(self, model: LanguageModel) -> Iterator[tuple[str, ...]]:
        """Reads the prompt, then draws to the end."""
        log_probs, states = self.begin(model)
        stream = Stream(model, states)

        def pieces(log_probs: Tensor | None) -> Iterator[tuple[str, ...]]:
            while not self.done:
                yield self.draw(log_probs)
                if not self.done:
                    log_probs = stream.read(torch.tensor(self.ids, device=model.device)).cpu()

        return pieces(log_probs)
