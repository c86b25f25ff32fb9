"""The language model: embedding -> stacked recurrent layers -> decoder."""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast, final

import torch
from torch import Tensor, nn

from unrolled.nn.cells import CELLS, Cell
from unrolled.nn.unroll import LayerStates, Unroll, unroll


@final
class LanguageModel(nn.Module):
    """Next-token logits for B streams of ids, as in Zaremba et al. 2014 (arXiv 1409.2329), fig. 2.

    Dropout falls on the embedding and on every layer's output, never on the recurrence. Layers may differ in size:
    each reads the output of the one below.

    Args:
        vocab_size: V, the number of distinct ids.
        embedding_size: E, the length of a token's vector.
        hidden_sizes: H of each of the L layers, from the bottom up.
        cell: a name in `CELLS`.
        dropout: the probability that a unit is dropped (1 - "keep probability").
        init_scale: every weight begins uniform in [-init_scale, init_scale], every bias at zero.
        forget_bias: added to the LSTM's forget gate at the start; the references use none.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        hidden_sizes: Sequence[int],
        cell: str = "lstm",
        dropout: float = 0.0,
        init_scale: float = 0.1,
        forget_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        sizes = [embedding_size, *hidden_sizes]
        options = {"forget_bias": forget_bias} if cell == "lstm" else {}
        cells = nn.ModuleList(CELLS[cell](e, h, **options) for e, h in pairwise(sizes))
        self.layers = cast("Sequence[Cell]", cells)
        self.decoder = nn.Linear(sizes[-1], vocab_size)
        self.dropout = nn.Dropout(dropout)
        self.unroll: Unroll = unroll
        self.reset_parameters(init_scale)

    def reset_parameters(self, init_scale: float) -> None:
        """Draw the weights anew, from torch's global generator.

        Biases begin at zero (Zaremba et al. draw them too): the loss before training is then ln V whatever the seed,
        which is worth more as a check than the noise of a few frequent words' biases.
        """
        nn.init.uniform_(self.embedding.weight, -init_scale, init_scale)
        nn.init.uniform_(self.decoder.weight, -init_scale, init_scale)
        nn.init.zeros_(self.decoder.bias)
        for cell in self.layers:
            cell.reset_parameters(init_scale)

    @property
    def vocab_size(self) -> int:
        """V, the number of distinct ids."""
        return self.embedding.num_embeddings

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and so where inputs have to be."""
        return self.embedding.weight.device

    def initial_state(self, batch_size: int) -> LayerStates:
        """The zero state of `batch_size` streams."""
        return tuple(cell.initial_state(batch_size) for cell in self.layers)

    def hidden(self, inputs: Tensor, states: LayerStates) -> tuple[Tensor, LayerStates]:
        """inputs (T, B), states -> the top layer's outputs (T, B, H), the states after the last step."""
        outputs = self.dropout(self.embedding(inputs))
        after = []
        for cell, state in zip(self.layers, states, strict=True):
            outputs, state = self.unroll(cell, outputs, state)
            outputs = self.dropout(outputs)
            after.append(state)
        return outputs, tuple(after)

    def forward(self, inputs: Tensor, states: LayerStates) -> tuple[Tensor, LayerStates]:
        """inputs (T, B), states -> logits (T, B, V) of the token after each, the states after the last step."""
        outputs, states = self.hidden(inputs, states)
        return self.decoder(outputs), states

    def num_parameters(self) -> int:
        """How many numbers are learnt."""
        return sum(parameter.numel() for parameter in self.parameters())
