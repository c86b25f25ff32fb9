"""Log-probability of every token of given text."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from unrolled.data.tokens import Tokenizer
from unrolled.nn.loss import perplexity, token_nll
from unrolled.nn.model import LanguageModel

_LOGITS_AT_ONCE = 1 << 22


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


@torch.inference_mode()
def score(model: LanguageModel, tokenizer: Tokenizer, text: str) -> Score:
    """Scores a text that begins a line, from the zero state.

    The end of the line counts as one more token, so that the probabilities of all lines sum to one, except where the
    model knows no line ends.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        text: one line, or several.

    Raises:
        UnrolledError: something is not in the vocabulary, and the model has no `<unk>`.
    """
    ids = tokenizer.encode(text).astype(np.int64)
    ends_lines = tokenizer.token(tokenizer.start_id) in ("\n", "<eos>")
    end = [tokenizer.start_id] if ends_lines and not text.endswith("\n") else []
    ids = np.concatenate([[tokenizer.start_id], ids, end]).astype(np.int64)
    inputs = torch.from_numpy(ids).unsqueeze(1).to(model.device)  # (T + 1, 1)
    state, log_probs = model.initial_state(1), []
    steps = max(1, _LOGITS_AT_ONCE // model.vocab_size)
    for window, targets in zip(inputs[:-1].split(steps), inputs[1:].split(steps), strict=True):
        outputs, state = model.hidden(window, state)
        log_probs += (-token_nll(outputs, model.decoder, targets)).flatten().tolist()
    tokens = [tokenizer.token(int(id)) for _, id in pairwise(ids)]
    unknown = 0 if tokenizer.unknown_id is None else int((ids[1:] == tokenizer.unknown_id).sum())
    return Score(text, list(zip(tokens, log_probs, strict=True)), unknown)
