"""Log-probability of every token of given texts, many at a time or one document through."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, final, get_args

import numpy as np
import torch

from unrolled.data.tokens import Tokenizer
from unrolled.errors import UnrolledError
from unrolled.inference.reading import Reading, Unread, alike
from unrolled.inference.shown import score_html
from unrolled.nn.loss import perplexity
from unrolled.nn.model import LanguageModel
from unrolled.nn.unroll import LayerStates

Unknown = Literal["count", "skip", "spell"]


@dataclass(frozen=True)
class Score:
    """How probable a text is. Probabilities are natural logarithms; `unknown` counts the tokens that were `<unk>`."""

    text: str
    per_token: list[tuple[str, float]]
    unknown: int

    @property
    def log_prob(self) -> float:
        """The sum over all tokens, in nats."""
        return math.fsum(log_prob for _, log_prob in self.per_token)

    @property
    def tokens(self) -> int:
        """How many tokens were scored."""
        return len(self.per_token)

    @property
    def perplexity(self) -> float | None:
        """None for a text without tokens."""
        return perplexity(-self.log_prob, self.tokens) if self.per_token else None

    def _repr_html_(self) -> str:
        return score_html(self.per_token, self.unknown, self.perplexity)


@final
class Scorer:
    """Scores texts under a model.

    A text begins a line in the zero state. The end of the line counts as one more token, so that the probabilities of
    all lines sum to one, except where the model knows no line ends.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        begin: the first token follows the end of a line; without it, it follows nothing and is only read.
        end: the end of the line is scored.
        unknown: what `<unk>` is worth: "count", its own probability; "skip", it is read and left out; "spell", its own
            probability times that of its letters, all alike: 1 / (C + 1) for each and for the end of the word, where C
            is the number of different characters in the vocabulary.
        most_tokens: longer texts are refused.
        rounded: products of bf16.

    Raises:
        UnrolledError: there is no such `unknown`.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        begin: bool = True,
        end: bool = True,
        unknown: Unknown = "count",
        most_tokens: int = 1_000_000,
        rounded: bool = False,
    ) -> None:
        if unknown not in get_args(Unknown):
            raise UnrolledError(f"unknown is {unknown!r}; it may be " + ", ".join(get_args(Unknown)))
        self.model, self.tokenizer, self.begin, self.unknown = model, tokenizer, begin, unknown
        self.end = end and tokenizer.token(tokenizer.start_id) in ("\n", "<eos>")
        self.most_tokens, self.rounded = most_tokens, rounded
        self._states, self._before = model.initial_state(1), [tokenizer.start_id] * begin
        if unknown == "spell":
            letters = set("".join(token for token in tokenizer.vocabulary if not token.startswith("<")))
            self.nats_a_letter = math.log(len(letters) + 1)

    def score(self, text: str) -> Score:
        """One text.

        Raises:
            UnrolledError: it is too long, or something is not in the vocabulary of a model without `<unk>`.
        """
        if not isinstance(text, str):
            raise TypeError(f"score takes one text, not {type(text).__name__}; score_many takes several")
        (score,) = self.score_many([text])
        if isinstance(score, UnrolledError):
            raise score
        return score

    def score_many(self, texts: Sequence[str]) -> list[Score | UnrolledError]:
        """Each text by itself; an error stands in the place of one that cannot be scored.

        They go through the model side by side, those of like length together.
        """
        if isinstance(texts, str):
            raise TypeError("score_many takes several texts; score takes one")
        scores: dict[int, Score | UnrolledError] = {}
        encoded: list[tuple[int, np.ndarray]] = []
        for number, text in enumerate(texts):
            try:
                encoded.append((number, self.encoded(text)))
            except UnrolledError as error:
                scores[number] = error
        for group in alike([len(ids) for _, ids in encoded]):
            chosen = [encoded[place] for place in group]
            reading = self._read([ids for _, ids in chosen])
            for (number, ids), nats in zip(chosen, reading.nats, strict=True):
                scores[number] = self.scored(texts[number], ids, nats)
        return [scores[number] for number in range(len(texts))]

    def score_next(self, line: str) -> Score:
        """The next line of a document, with all lines before it as its context.

        Raises:
            UnrolledError: as `score`; then it is as if there had been no such line.
        """
        encoded, end = self._checked(line), [self.tokenizer.start_id]
        has_end = self._as_trained(line).endswith("\n") and encoded[-1:].tolist() == end  # and so needs no other
        ids, unread = np.concatenate([self._before, encoded, [] if has_end else end]).astype(np.int64), not self._before
        reading = self._read([ids], self._states)
        self._states, self._before, kept = reading.states, end, len(ids) - (not self.end and not has_end)
        return self._scored(line, ids[:kept], reading.nats[0][: max(kept - 1, 0)], unread)

    def encoded(self, text: str) -> np.ndarray:
        """The ids (T + 1,) of a text and of what stands before it: what `scored` takes, once they were read.

        Raises:
            UnrolledError: as `score`.
        """
        ids, start = self._checked(text), [self.tokenizer.start_id]
        before, end = start * self.begin, start * (self.end and not self._as_trained(text).endswith("\n"))
        return np.concatenate([before, ids, end]).astype(np.int64)

    def scored(self, text: str, ids: np.ndarray, nats: np.ndarray) -> Score:
        """The score of a text from its ids (T + 1,) and the nats (T,) of all of them but the first."""
        return self._scored(text, ids, nats, unread=not self.begin)

    # -------------------------------------------------------------------------------------------- within

    def _as_trained(self, text: str) -> str:
        """Its lines end as those of the text that the model was trained on: bytes are as they are."""
        return text if self.tokenizer.unit == "byte" else text.replace("\r\n", "\n").replace("\r", "\n")

    def _checked(self, text: str) -> np.ndarray:
        ids = self.tokenizer.encode(self._as_trained(text))
        if len(ids) > self.most_tokens:
            raise UnrolledError(f"{len(ids):,} tokens are more than {self.most_tokens:,}")
        return ids

    def _read(self, texts: list[np.ndarray], states: LayerStates | None = None) -> Reading:
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.rounded):
            return Reading(self.model, [Unread(ids[:-1], ids[1:]) for ids in texts], states).finish()

    def _scored(self, text: str, ids: np.ndarray, nats: np.ndarray, unread: bool) -> Score:
        """From ids (T + 1,) and nats (T,); `unread`: the text's own first token is not among those scored."""
        tokenizer, unknown_id = self.tokenizer, self.tokenizer.unknown_id
        tokens, log_probs = [tokenizer.token(int(id)) for _, id in pairwise(ids)], -nats
        unknown = np.flatnonzero(ids[1:] == unknown_id) if unknown_id is not None else np.zeros(0, np.int64)
        if len(unknown) and self.unknown == "spell":
            spelled = self._spelled(text)
            for place in unknown.tolist():
                log_probs[place] -= (len(spelled[place + unread]) + 1) * self.nats_a_letter
        per_token = list(zip(tokens, log_probs.tolist(), strict=True))
        if self.unknown == "skip":
            left_out = set(unknown.tolist())
            per_token = [pair for place, pair in enumerate(per_token) if place not in left_out]
        return Score(text, per_token, len(unknown))

    def _spelled(self, text: str) -> list[str]:
        """Each token as it stands in the text."""
        text = self._as_trained(text)
        if self.tokenizer.unit != "word":
            return list(text)
        lines = text.split("\n")
        return [word for line in lines for word in [*line.split(), "\n"]]
