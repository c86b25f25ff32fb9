"""The language model: embedding -> stacked recurrent layers -> decoder."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from unrolled.nn.cells import CELLS, Cell, Jordan
from unrolled.nn.dropout import Dropout
from unrolled.nn.loss import decoder_loss
from unrolled.nn.unroll import LayerStates, Unroll, unroll


@final
class Embedding(nn.Embedding):
    """PyTorch's, but it draws nothing on the device "meta", for which PyTorch would import its compiler."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


@final
class LanguageModel(nn.Module):
    """Next-token logits for B streams of ids, as in Zaremba et al. 2014 (arXiv 1409.2329), fig. 2.

    Dropout falls on the embedding and on every layer's output, never on the recurrence. Layers may differ in size:
    each reads the output of the one below.

    Args:
        vocab_size: V, the number of distinct ids.
        embedding_size: E, the length of a token's vector; 0 for none, so that the first layer reads one-hot tokens.
        hidden_sizes: H of each of the L layers, from the bottom up.
        cell: a name in `CELLS`.
        dropout: the probability that a unit is dropped (1 - "keep probability").
        init_scale: every weight begins uniform in [-init_scale, init_scale], every bias at zero.
        draw_decoder_bias, draw_layer_biases: but the decoder's, or the layers', which begin as the weights do.
        tie_weights: the decoder's matrix is the embedding (Press & Wolf 2017, arXiv 1608.05859); E is then the top H.
        cell_options: what else the cell is made with, such as `forget_bias` or `activation`.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        hidden_sizes: Sequence[int],
        cell: str = "lstm",
        dropout: float = 0.0,
        init_scale: float = 0.1,
        tie_weights: bool = False,
        draw_decoder_bias: bool = False,
        draw_layer_biases: bool = False,
        **cell_options: Any,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.embedding = Embedding(vocab_size, embedding_size) if embedding_size else nn.Identity()
        sizes = [embedding_size or vocab_size, *hidden_sizes]
        cells = nn.ModuleList(CELLS[cell](e, h, **cell_options) for e, h in pairwise(sizes))
        self.layers = cast("Sequence[Cell]", cells)
        self.decoder = nn.Identity() if CELLS[cell].decodes else nn.Linear(sizes[-1], vocab_size)
        if tie_weights and isinstance(self.embedding, nn.Embedding) and isinstance(self.decoder, nn.Linear):
            self.decoder.weight = self.embedding.weight
        self.dropout = Dropout(dropout)
        self.unroll: Unroll = unroll
        self.reset_parameters(init_scale, draw_decoder_bias, draw_layer_biases)

    def reset_parameters(
        self, init_scale: float, draw_decoder_bias: bool = False, draw_layer_biases: bool = False
    ) -> None:
        """Draw the weights anew, from torch's global generator.

        Where the decoder's biases begin at zero the loss before training is ln V whatever the seed. TensorFlow's
        tutorial draws them, and Zaremba's program those of the layers too.
        """
        if isinstance(self.embedding, nn.Embedding):
            nn.init.uniform_(self.embedding.weight, -init_scale, init_scale)
        if isinstance(self.decoder, nn.Linear):
            nn.init.uniform_(self.decoder.weight, -init_scale, init_scale)
            nn.init.zeros_(self.decoder.bias)
        for cell in self.layers:
            cell.reset_parameters(init_scale, draw_layer_biases)
        if draw_decoder_bias and isinstance(self.decoder, nn.Linear):
            nn.init.uniform_(self.decoder.bias, -init_scale, init_scale)

    @property
    def has_tied_weights(self) -> bool:
        """Whether the decoder's matrix is the embedding."""
        return isinstance(self.embedding, nn.Embedding) and self.embedding.weight is self.decoder.weight

    @property
    def device(self) -> torch.device:
        """Where the parameters are, and so where inputs have to be."""
        return self.layers[0].weight_ih.device

    @property
    def token_vectors(self) -> Tensor:
        """A vector for each token, (V, E): the embedding, or the first matrix's columns where inputs are one-hot."""
        return self.embedding.weight if isinstance(self.embedding, nn.Embedding) else self.layers[0].weight_ih.T

    @property
    def feeds_back_output(self) -> bool:
        """Whether this is a Jordan network, whose figures differ with teacher forcing and without."""
        return isinstance(self.layers[0], Jordan)

    def initial_state(self, batch_size: int) -> LayerStates:
        """The zero state of `batch_size` streams."""
        return tuple(cell.initial_state(batch_size) for cell in self.layers)

    def hidden(self, inputs: Tensor, states: LayerStates) -> tuple[Tensor, LayerStates]:
        """inputs (T, B), states -> the top layer's outputs (T, B, H), the states after the last step."""
        outputs = self.embedding(inputs)
        if outputs.is_floating_point():
            outputs = self.dropout(outputs)
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

    def nll(self, inputs: Tensor, targets: Tensor, states: LayerStates) -> tuple[Tensor, int, LayerStates]:
        """inputs, targets (T, B) -> summed negative log-likelihood in nats, how many targets, the states after."""
        outputs, states = self.hidden(inputs, states)
        return *decoder_loss(outputs, self.decoder, targets), states

    def num_parameters(self) -> int:
        """How many numbers are learnt."""
        return sum(parameter.numel() for parameter in self.parameters())
