"""The likeliest next tokens after a text, and texts continued."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unrolled.data.tokens import Tokenizer
from unrolled.errors import UnrolledError
from unrolled.nn.model import LanguageModel
from unrolled.nn.stream import Stream
from unrolled.nn.unroll import LayerStates

_STEPS_AT_ONCE = 256


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
    with torch.autocast(model.device.type, enabled=False):
        return model.decoder(outputs[-1, 0].float()).log_softmax(-1), state


@torch.inference_mode()
def predict(
    model: LanguageModel, tokenizer: Tokenizer, prefix: str = "", k: int = 10, unknown: bool = False
) -> Prediction:
    """The k likeliest tokens after `prefix`, with the model's own probabilities.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        prefix: the beginning of a line; "" asks what begins one.
        k: how many; no more than there are.
        unknown: whether `<unk>` may be among them. Leaving it out does not raise the others' probabilities.

    Raises:
        UnrolledError: k is less than 1, or the prefix is not in the model's vocabulary and it has no `<unk>`.
    """
    if k < 1:
        raise UnrolledError(f"k must be at least 1, not {k}")
    log_probs, _ = read_prefix(model, tokenizer, prefix)
    if not unknown and tokenizer.unknown_id is not None:
        log_probs[tokenizer.unknown_id] = -torch.inf
    values, ids = log_probs.topk(min(k, len(tokenizer)))
    found = zip(ids.tolist(), values.exp().tolist(), strict=True)
    return Prediction(prefix, [(tokenizer.token(id), value) for id, value in found if value > 0])


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    length: int = 100,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    unknown: bool = False,
    random_start: bool = False,
) -> Iterator[str]:
    """Draws `length` tokens after `prompt`; yields the text that each adds, as it is drawn.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        prompt: the beginning of a line; "" begins a new one.
        length: tokens to draw.
        temperature: the logits are divided by it; 0 takes the likeliest token every time.
        top_k: draw among the k likeliest only; 0 for all.
        top_p: draw among the fewest likeliest whose probabilities sum to at least this; 1 for all.
        seed: of the draw; the same seed gives the same text. None takes a new one.
        unknown: whether `<unk>` may be drawn.
        random_start: in place of a prompt, the first token is drawn from all alike and read from the zero state.

    Raises:
        UnrolledError: an option is out of bounds, or the prompt is not in the vocabulary of a model without `<unk>`.
    """
    if length < 0:
        raise UnrolledError(f"length must be at least 0, not {length}")
    if not 0 <= temperature < float("inf"):
        raise UnrolledError(f"temperature must be at least 0, not {temperature}")
    if top_k < 0:
        raise UnrolledError(f"top-k must be at least 0, not {top_k}")
    if not 0 < top_p <= 1:
        raise UnrolledError(f"top-p must be more than 0 and at most 1, not {top_p}")
    if seed is not None and not 0 <= seed < 1 << 63:
        raise UnrolledError(f"seed must be at least 0 and below 2 to the 63rd, not {seed}")
    if not unknown and tokenizer.unknown_id is not None and len(tokenizer) == 1:
        raise UnrolledError("nothing can be drawn: the vocabulary holds <unk> alone")
    if random_start and prompt:
        raise UnrolledError("--random-start and a prompt exclude each other")
    source = torch.Generator().manual_seed(new_seed() if seed is None else seed)
    log_probs, state = (None, model.initial_state(1)) if random_start else read_prefix(model, tokenizer, prompt)
    stream = Stream(model, state)
    return _drawn(stream, tokenizer, prompt, log_probs, length, temperature, top_k, top_p, source, unknown)


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
    stream: Stream,
    tokenizer: Tokenizer,
    prompt: str,
    log_probs: Tensor | None,
    length: int,
    temperature: float,
    top_k: int,
    top_p: float,
    source: torch.Generator,
    unknown: bool,
) -> Iterator[str]:
    write = tokenizer.decoder()
    for id in tokenizer.encode(prompt).tolist():  # so that the text goes on where the prompt ends
        write(id)
    for _ in range(length):
        allowed = torch.zeros(len(tokenizer)) if log_probs is None else log_probs.cpu().clone()
        if not unknown and tokenizer.unknown_id is not None:
            allowed[tokenizer.unknown_id] = -torch.inf
        if log_probs is None:  # the first token of a random start, drawn from all alike
            id = draw(allowed, source, temperature=1.0, top_k=0, top_p=1.0)
        else:
            id = draw(allowed, source, temperature, top_k, top_p)
        yield write(id)
        log_probs = stream.read(torch.tensor([id], device=stream.model.device))[0]


def draw(log_probs: Tensor, source: torch.Generator, temperature: float, top_k: int, top_p: float) -> int:
    """One id from log-probabilities (V,), sharpened by `temperature`, cut by `top_k` and then `top_p`.

    top_p: Holtzman et al. 2020 (arXiv 1904.09751), "nucleus" sampling.
    """
    if temperature == 0:
        return int(log_probs.argmax())
    values, ids = ((log_probs.double() - log_probs.max()) / temperature).sort(descending=True, stable=True)
    if top_k:
        values, ids = values[:top_k], ids[:top_k]
    probabilities = values.softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities[before < top_p]
    return int(ids[torch.multinomial(probabilities, 1, generator=source)])
