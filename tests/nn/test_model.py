"""The language model as the references have it."""

import math

import pytest
import torch
from torch import nn

from unrolled.nn.loss import loss
from unrolled.nn.model import LanguageModel
from unrolled.nn.unroll import unroll_fused, unroll_plain, unroll_projected


def test_ptb_small_has_as_many_parameters_as_its_reference() -> None:
    assert LanguageModel(10_000, 200, [200, 200]).num_parameters() == 4_651_600


def test_tied_weights_are_one_matrix_that_learns_from_both_its_uses() -> None:
    tied, apart = LanguageModel(300, 8, [12, 8], tie_weights=True), LanguageModel(300, 8, [12, 8])
    assert tied.num_parameters() == apart.num_parameters() - 300 * 8
    apart.load_state_dict(tied.state_dict())
    ids = torch.randint(300, (6, 4))
    for model in (tied, apart):
        nll, _, _ = model.nll(ids[:-1], ids[1:], model.initial_state(4))
        nll.backward()
    ours, theirs = (dict(model.named_parameters()) for model in (tied, apart))
    expected = sum(
        gradient for name in ("embedding", "decoder") if (gradient := theirs[f"{name}.weight"].grad) is not None
    )
    torch.testing.assert_close(ours["embedding.weight"].grad, expected)


def test_biases_are_drawn_where_that_is_asked_for_and_the_rest_is_as_it_was() -> None:
    models = []
    for decoder, layers in ((False, False), (True, False), (True, True)):
        torch.manual_seed(3)
        model = LanguageModel(300, 8, [12, 8], draw_decoder_bias=decoder, draw_layer_biases=layers, join="add")
        models.append(dict(model.named_parameters()))
    biases = [name for name in models[0] if "bias" in name]
    assert len(biases) == 5
    for name in models[0]:
        assert torch.equal(models[0][name], models[1][name]) == (name != "decoder.bias")
        assert bool(models[0][name].any()) == ("bias" not in name)
        assert models[2][name].any()


def test_layers_may_differ_in_size() -> None:
    model = LanguageModel(10_000, 200, [256, 128])
    assert model.num_parameters() == 3_955_088
    logits, state = model(torch.zeros(3, 2, dtype=torch.int64), model.initial_state(2))
    assert logits.shape == (3, 2, 10_000)
    assert [part.shape for layer in state for part in layer] == [(2, 256), (2, 256), (2, 128), (2, 128)]


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_before_training_is_that_of_the_uniform(seed: int) -> None:
    torch.manual_seed(seed)
    model = LanguageModel(10_000, 200, [200, 200])
    ids = torch.randint(10_000, (21, 20))
    logits, _ = model(ids[:-1], model.initial_state(20))
    nll_nats, count = loss(logits, ids[1:])
    assert abs(nll_nats.item() / count - math.log(10_000)) < 0.01


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("sizes", [[7], [9, 5, 6]])
def test_the_model_is_the_same_by_either_unrolling(cell: str, sizes: list[int]) -> None:
    model = LanguageModel(11, 4, sizes, cell=cell, init_scale=0.5)
    inputs, results = torch.randint(11, (8, 3)), []
    for way in (unroll_plain, unroll_projected, unroll_fused):
        model.unroll = way
        logits, state = model(inputs, model.initial_state(3))
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append([logits, *(part for layer in state for part in layer), *gradients])
    for plain, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)


def test_dropout_is_on_the_embedding_and_every_layers_output_and_off_in_evaluation() -> None:
    seen: list[torch.Tensor] = []
    model = LanguageModel(11, 40, [50, 60], dropout=0.5)
    model.dropout.register_forward_hook(lambda module, inputs, output: seen.append(output / inputs[0]))
    model(torch.randint(11, (20, 4)), model.initial_state(4))
    assert [ratio.shape[-1] for ratio in seen] == [40, 50, 60]
    for ratio in seen:
        values = ratio[ratio.isfinite()]
        assert set(values.round(decimals=4).tolist()) == {0.0, 2.0}
        assert 0.4 < (values == 0).float().mean() < 0.6
    seen.clear()
    model.eval()(torch.randint(11, (20, 4)), model.initial_state(4))
    assert all((ratio[ratio.isfinite()] == 1).all() for ratio in seen)


def test_two_equal_layers_are_torchs_lstm() -> None:
    model = LanguageModel(30, 8, [8, 8], init_scale=0.3)
    theirs = nn.LSTM(8, 8, num_layers=2)
    for number, cell in enumerate(model.layers):
        for name, parameter in cell.named_parameters():
            getattr(theirs, f"{name}_l{number}").data.copy_(parameter)
        getattr(theirs, f"bias_hh_l{number}").data.zero_()
    ids = torch.randint(30, (12, 5))
    expected, _ = theirs(model.embedding(ids))
    logits, _ = model(ids, model.initial_state(5))
    torch.testing.assert_close(logits, model.decoder(expected))
