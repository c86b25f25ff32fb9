"""Texts under way to whoever asked for them."""

from collections.abc import AsyncIterator
from typing import TypeAlias, final

import torch

from unrolled.inference.detokenize import Detokenizer
from unrolled.inference.generate import Drawing
from unrolled.nn.unroll import LayerStates, pick
from unrolled.run import Run
from unrolled.serving import schema
from unrolled.serving.engine import Drawn, Engine

Start: TypeAlias = tuple[torch.Tensor | None, LayerStates]
"""What a drawing begins from: log-probabilities (V,), None for all alike, and the state (B = 1)."""


@final
class Writing:
    """Texts being written. Iterate it for pieces, then `answer` has the whole."""

    def __init__(
        self,
        engine: Engine,
        run: Run,
        drawing: Drawing,
        start: Start,
        model: str,
        prompt: str,
        seed: int,
        detokenized: bool = False,
        wants_log_probs: bool = False,
    ) -> None:
        self.engine, self.run, self.drawing = engine, run, drawing
        self.model, self.prompt, self.seed, self.detokenized = model, prompt, seed, detokenized
        self.wants_log_probs = wants_log_probs
        samples = len(drawing.writers)
        log_probs, states = start
        self._log_probs = None if log_probs is None else log_probs.expand(samples, -1)
        self._states = pick(states, [0] * samples)
        self._joiners = [Detokenizer() for _ in drawing.writers]
        self._pieces: list[list[str]] = [[] for _ in drawing.writers]

    async def __aiter__(self) -> AsyncIterator[Drawn]:
        start = self._log_probs, self._states
        async for drawn in self.engine.draw(self.run, self.drawing, *start, self.wants_log_probs):
            pieces = drawn.pieces
            if self.detokenized:
                pieces = tuple(joiner.add(piece) for joiner, piece in zip(self._joiners, pieces, strict=True))
            yield self._written(drawn._replace(pieces=pieces))
        if self.detokenized:
            rest = Drawn(tuple(joiner.rest() for joiner in self._joiners), [], None, self.drawing.tokens, [])
            yield self._written(rest)

    def _written(self, drawn: Drawn) -> Drawn:
        for pieces, piece in zip(self._pieces, drawn.pieces, strict=True):
            pieces.append(piece)
        return drawn

    def answer(self) -> schema.GenerateAnswer:
        """All texts as far as they were written."""
        texts = [
            schema.Text(
                text="".join(pieces),
                tokens=tokens,
                finish_reason="stop" if writer.done else "length",
            )
            for pieces, tokens, writer in zip(self._pieces, self.drawing.tokens, self.drawing.writers, strict=True)
        ]
        return schema.GenerateAnswer(model=self.model, prompt=self.prompt, seed=self.seed, texts=texts)
