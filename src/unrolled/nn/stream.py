"""A model that reads B texts token by token, for those who ask after each what comes next."""

from typing import final

import torch
from torch import Tensor, nn

from unrolled.kernels import ops, step
from unrolled.nn.model import LanguageModel
from unrolled.nn.rounding import is_asked
from unrolled.nn.unroll import LayerStates, kernel_layer


@final
class Stream:
    """Reads a token of each of B texts at a time, and says how probable every token is to follow.

    Where kernels serve, the weights are laid out once when the stream is made and read from end to end for every token;
    else each token goes through the model. The weights must not change meanwhile. Made within `torch.autocast` it reads
    in bf16, wherever it is read; but on the CPU without kernels in f32, for PyTorch would round all weights anew for
    every token.

    Args:
        model: in evaluation mode.
        states: of B texts, from `model.initial_state(B)` or after what was read so far.
    """

    def __init__(self, model: LanguageModel, states: LayerStates) -> None:
        self.model = model
        kind = model.device.type
        narrow = is_asked(kind)
        self._precision = torch.autocast(kind, torch.bfloat16, enabled=narrow and kind != "cpu")
        self._packed: Tensor | None = None
        layers = [layer for cell in model.layers if (layer := kernel_layer(cell))]
        decoder = model.decoder
        if (
            all(map(ops.serves, model.parameters()))
            and len(layers) == len(model.layers) <= step.MOST_LAYERS
            and isinstance(decoder, nn.Linear)
            and decoder.bias is not None
        ):
            embedding = model.embedding.weight if isinstance(model.embedding, nn.Embedding) else None
            alone = len(states[0][0]) == 1
            self._packed = step.pack(layers, embedding, decoder.weight, decoder.bias, narrow, remembers=alone)
        self.states = states

    @torch.inference_mode()
    def read(self, ids: Tensor) -> Tensor:
        """ids (B,) -> log-probabilities (B, V) of what follows each."""
        if self._packed is None:
            return self._read_plain(ids)
        logits, normaliser = torch.ops.unrolled.step(self._packed, ids, self._state, self.model.vocab_size)
        return logits[:, : self.model.vocab_size] - normaliser.unsqueeze(-1)

    @property
    def states(self) -> LayerStates:
        """Of the texts as far as they were read. Others may take their place, as many as there are."""
        if self._packed is None:
            return self._states
        parts = iter(self._parts())
        return tuple(tuple(next(parts).clone() for _ in state) for state in self._states)

    @states.setter
    def states(self, states: LayerStates) -> None:
        self._states = states
        if self._packed is not None:
            self._state = torch.cat([part.flatten() for state in states for part in state])
            self._streams = len(states[0][0])

    def _parts(self) -> list[Tensor]:
        """The layers' states (B, H) one after the other, as they lie in the kernels' memory."""
        sizes = [part.shape[1] for state in self._states for part in state]
        parts = self._state.split([self._streams * size for size in sizes])
        return [part.view(self._streams, size) for part, size in zip(parts, sizes, strict=True)]

    def likeliest(self, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """ids (1,) -> the k largest log-probabilities of what follows, falling, and the ids that have them."""
        if self._packed is None:
            return self._read_plain(ids)[0].topk(k)
        return step.likeliest(self._packed, ids, self._state, k)

    @torch.inference_mode()
    def _read_plain(self, ids: Tensor) -> Tensor:
        """The oracle of `read`."""
        with self._precision:
            logits, self._states = self.model(ids.unsqueeze(0), self._states)
        return logits[0].float().log_softmax(-1)
