"""How the next token is drawn, and how what is drawn becomes text."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from unrolled.data.tokens import Tokenizer
from unrolled.errors import UnrolledError


@dataclass(frozen=True)
class Sampling:
    """What may be drawn, and how boldly.

    Raises:
        UnrolledError: an option is out of bounds.
    """

    temperature: float = 1.0
    """The logits are divided by it; 0 takes the likeliest token every time."""
    top_k: int = 0
    """Draw among the k likeliest only; 0 for all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest that sum to at least this (Holtzman et al. 2020, arXiv 1904.09751)."""
    min_p: float = 0.0
    """Draw among those at least so likely, as a share of the likeliest (Nguyen et al. 2024, arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """The log-probability of what has come before is multiplied by it (after Keskar et al. 2019, arXiv 1909.05858)."""
    unknown: bool = False
    """Whether `<unk>` may be drawn."""
    banned: tuple[str, ...] = ()
    """Tokens that may not."""

    def __post_init__(self) -> None:
        if isinstance(self.banned, str):
            object.__setattr__(self, "banned", (self.banned,))
        if not 0 <= self.temperature < float("inf"):
            raise UnrolledError(f"temperature must be at least 0, not {self.temperature}")
        if self.top_k < 0:
            raise UnrolledError(f"top-k must be at least 0, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UnrolledError(f"top-p must be more than 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UnrolledError(f"min-p must be at least 0 and at most 1, not {self.min_p}")
        if not 1 <= self.repetition_penalty < float("inf"):
            raise UnrolledError(f"repetition-penalty must be at least 1, not {self.repetition_penalty}")

    def mask(self, tokenizer: Tokenizer) -> Tensor:
        """What is added to log-probabilities (V,): minus infinity for what may not be drawn, else zero.

        Raises:
            UnrolledError: a banned token is not in the vocabulary, or nothing is left.
        """
        mask = torch.zeros(len(tokenizer), dtype=torch.float32, device="cpu")
        if not self.unknown and tokenizer.unknown_id is not None:
            mask[tokenizer.unknown_id] = -torch.inf
        for token in self.banned:
            mask[tokenizer.id_of(token)] = -torch.inf
        if not mask.isfinite().any():
            raise UnrolledError("nothing can be drawn: all of the vocabulary is banned or <unk>")
        return mask

    def draw(self, log_probs: Tensor, source: torch.Generator, before: Tensor | None = None) -> int:
        """One id from log-probabilities (V,), of which those not allowed are minus infinity.

        Args:
            log_probs: (V,).
            source: of randomness.
            before: (V,), whether a token has come before; None for none.
        """
        if before is not None and self.repetition_penalty > 1:
            log_probs = torch.where(before, log_probs * self.repetition_penalty, log_probs)
        if self.temperature == 0:
            return int(log_probs.argmax())
        values = (log_probs.double() - log_probs.max()) / self.temperature
        ids = None  # as they stand; sorting all of them takes longer than all the rest
        if 0 < self.top_k < len(values):
            values, ids = values.topk(self.top_k)
        elif self.top_p < 1:
            values, ids = values.sort(descending=True, stable=True)
        probabilities = values.softmax(-1)
        if self.top_p < 1:
            before_each = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.where(before_each < self.top_p, 0.0)
        if self.min_p > 0:
            probabilities = probabilities.where(probabilities >= self.min_p * probabilities.max(), 0.0)
        place = torch.multinomial(probabilities, 1, generator=source)
        return int(place if ids is None else ids[place])


@final
class Writer:
    """Ids become text, until one of the stops has been written; it and what follows are not.

    What may be the beginning of a stop is held back until it is known.

    Args:
        decode: from the next id to the text that it adds.
        stops: texts at which the writing ends.
    """

    def __init__(self, decode: Callable[[int], str], stops: tuple[str, ...]) -> None:
        self.decode, self.stops = decode, tuple(stop for stop in stops if stop)
        self.held, self.done = "", False

    def write(self, id: int) -> str:
        """The text that is certain now."""
        if self.done:
            return ""
        self.held += self.decode(id)
        ends = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if ends:
            self.done = True
            certain, self.held = self.held[: min(ends)], ""
            return certain
        kept = max((n for stop in self.stops for n in self._begun(stop)), default=0)
        certain, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        return certain

    def _begun(self, stop: str) -> Iterator[int]:
        """How much of a stop what is held may end with."""
        return (n for n in range(1, min(len(stop), len(self.held) + 1)) if self.held.endswith(stop[:n]))

    def rest(self) -> str:
        """What was held back, at the end."""
        rest, self.held = self.held, ""
        return rest
