"""A text that grows, and what comes next after each word of it, for a step of the model and no more."""

from collections.abc import Callable
from typing import TypeVar, final

import numpy as np
import torch
from torch import Tensor

from unrolled.data.tokens import Tokenizer
from unrolled.inference.generate import Prediction, next_token, prefix_ids
from unrolled.inference.reading import NOTHING, Reading, Unread
from unrolled.nn.model import LanguageModel
from unrolled.nn.stream import Stream

T = TypeVar("T")
_FEW = 16
"""Tokens that are read one by one; more of them go through the model as a window."""


@final
class Session:
    """A text being read, by one thread at a time.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        text: its beginning, which begins a line.
        rounded: products of bf16.

    Attributes:
        text: all that was given to read.

    Raises:
        UnrolledError: something is not in the vocabulary of a model without `<unk>`.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, text: str = "", rounded: bool = False) -> None:
        self.model, self.tokenizer, self.text = model, tokenizer, text
        self._precision = torch.autocast(model.device.type, torch.bfloat16, enabled=rounded)
        with self._precision:
            self._stream = Stream(model, model.initial_state(1))
        self._unread = prefix_ids(tokenizer, text)
        self._last, self._before = 0, self._stream.states  # the last token that was read, and the state before it
        self._likeliest: list[tuple[int, float]] = []
        self._log_probs: Tensor | None = None

    def read(self, text: str) -> None:
        """Goes on with `text`; its words are whole.

        Raises:
            UnrolledError: something in it is not in the vocabulary of a model without `<unk>`; then nothing was read.
        """
        self._unread = np.concatenate([self._unread, self.tokenizer.encode(text)])
        self.text += text

    @torch.inference_mode()
    def predict(self, k: int = 10, unknown: bool = False, typed: str = "") -> Prediction:
        """The k likeliest next tokens, with the model's probabilities.

        Args:
            k: how many; no more than there are.
            unknown: whether `<unk>` may be among them.
            typed: how the next word begins, which has not been read: only words that begin so are named, their
                probabilities given that it is one of them.

        Raises:
            UnrolledError: k is less than 1, `typed` is more than a word, or words are to be completed by a model of
                other tokens.
        """
        question = next_token(self.tokenizer, k, unknown, typed)
        if typed:
            space = " " if self.text and not self.text[-1].isspace() else ""
            return Prediction(self.text + space + typed, question.answer(self._following()).words)
        most = min(k + 1, len(self.tokenizer))  # one more, for one may be <unk>
        if len(self._unread) or len(self._likeliest) < most:
            values, ids = self._asked(lambda last: self._stream.likeliest(last, most))
            self._likeliest = list(zip(ids.tolist(), values.exp().tolist(), strict=True))
        pairs = [pair for pair in self._likeliest if unknown or pair[0] != self.tokenizer.unknown_id]
        return Prediction(self.text, [(self.tokenizer.token(id), value) for id, value in pairs[:k]])

    def _following(self) -> Tensor:
        """Log-probabilities (V,) of the next token."""
        if len(self._unread) or self._log_probs is None:
            self._log_probs = self._asked(self._stream.read)[0].cpu()
        return self._log_probs

    def _asked(self, ask: Callable[[Tensor], T]) -> T:
        """What the stream answers when it reads the last token."""
        last = self._next_id()
        try:
            return ask(last)
        except BaseException:  # then that one has not been read
            self._unread, self._stream.states = np.array([self._last]), self._before
            raise

    def _next_id(self) -> Tensor:
        """The last token (1,), for the stream to read next: all before it has been read."""
        if not len(self._unread):
            self._stream.states = self._before
            return self._tensor(self._last)
        (*ids, last), begin = self._unread.tolist(), self._stream.states
        try:
            if len(ids) > _FEW:
                with self._precision:
                    reading = Reading(self.model, [Unread(np.array(ids), NOTHING)], begin).finish()
                self._stream.states = reading.states
            else:
                for id in ids:
                    self._stream.read(self._tensor(id))
        except BaseException:  # Ctrl-C too: then nothing was read
            self._stream.states = begin
            raise
        self._last, self._before = last, self._stream.states
        self._unread, self._likeliest, self._log_probs = self._unread[:0], [], None
        return self._tensor(last)

    def _tensor(self, id: int) -> Tensor:
        return torch.tensor([id], device=self.model.device)
