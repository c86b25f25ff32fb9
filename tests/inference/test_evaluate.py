"""Perplexity by a named protocol, whatever the work's shape."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers
from torch import nn
from torch.nn import functional as F

from unrolled import Run, UnrolledError
from unrolled.data.batches import Windows
from unrolled.data.dataset import prepare
from unrolled.data.text import open_corpus
from unrolled.data.tokens import Vocabulary
from unrolled.inference.evaluate import evaluate_exact, evaluate_paper, ngram_perplexity
from unrolled.nn.cells import teacher_forced
from unrolled.nn.loss import decoder_loss
from unrolled.nn.model import LanguageModel


@pytest.fixture(scope="module")
def ids(toy_run: Run) -> np.ndarray:
    return toy_run.tokenizer.encode("the old dog that sees a cat walks here\nbirds sing\n" * 400)[:5_003]


@torch.inference_mode()
def one_at_a_time(model: LanguageModel, ids: np.ndarray) -> float:
    """The slow oracle: the log-probability of each token after all before it."""
    state, nll_nats = model.initial_state(1), 0.0
    for current, following in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True):
        logits, state = model(torch.tensor([[current]]), state)
        nll_nats -= logits[0, 0].double().log_softmax(-1)[following].item()
    return nll_nats


@pytest.mark.parametrize(
    ("batch_size", "num_steps"), [(1, 1), (1, 20), (1, None), (2, 7), (5, 35), (32, 128), (32, None)]
)
def test_exact_is_the_sum_of_one_token_at_a_time(
    toy_run: Run, ids: np.ndarray, batch_size: int, num_steps: int | None
) -> None:
    result = evaluate_exact(toy_run.model, ids, batch_size, num_steps)
    assert result.tokens == len(ids) - 1
    assert result.nll_nats == pytest.approx(one_at_a_time(toy_run.model, ids), rel=1e-5)


@pytest.mark.parametrize("length", [2, 3, 999, 1000, 1001, 2000, 2001, 2002, 4999])
def test_exact_counts_every_target_once_at_any_length(toy_run: Run, ids: np.ndarray, length: int) -> None:
    result = evaluate_exact(toy_run.model, ids[:length])
    assert result.tokens == length - 1
    assert result.nll_nats == pytest.approx(one_at_a_time(toy_run.model, ids[:length]), rel=1e-5)


def test_exact_takes_one_sweep_of_a_model_that_forgets(ids: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    model, counted = (
        LanguageModel(int(ids.max()) + 1, 8, [12]),
        list[int](),
    )

    def counting(hidden: torch.Tensor, decoder: nn.Module, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
        counted.append(targets.numel())
        return decoder_loss(hidden, decoder, targets)

    monkeypatch.setattr("unrolled.inference.evaluate.decoder_loss", counting)
    assert evaluate_exact(model, ids).tokens == sum(counted)


def test_exact_is_exact_for_a_model_that_never_forgets() -> None:
    """Its segments' states do not settle, so the one stream has to be run after all."""
    torch.manual_seed(0)
    model = LanguageModel(5, 4, [6], init_scale=0.5, forget_bias=20.0)  # forget gates at one
    ids = np.random.default_rng(0).integers(0, 5, 8_001).astype(np.uint8)
    result = evaluate_exact(model, ids, batch_size=8)
    assert result.nll_nats == pytest.approx(one_at_a_time(model, ids), rel=1e-5)


def test_exact_on_real_text_does_not_depend_on_batching(ptb: str, toy_run: Run) -> None:
    torch.manual_seed(1)
    model = LanguageModel(10_000, 20, [30], init_scale=0.3)
    ids = prepare(open_corpus(ptb), Vocabulary("word", 10_000)).ids["test"]
    figures = [evaluate_exact(model, ids, *shape).nll_nats for shape in ((1, 500), (16, 50), (60, 33))]
    assert evaluate_exact(model, ids).tokens == 82_429
    assert figures == pytest.approx([figures[0]] * 3, rel=1e-6)


def test_paper_is_the_reference_codes_way(toy_run: Run, ids: np.ndarray) -> None:
    """20 streams in windows of 20, tail dropped, on torch.nn.LSTM."""
    model, (B, T) = toy_run.model, (20, 20)
    layers = []
    for cell in model.layers:
        layer = nn.LSTM(cell.input_size, cell.hidden_size)
        layer.load_state_dict(
            {f"{name}_l0": value for name, value in cell.state_dict().items()}
            | {"bias_hh_l0": torch.zeros_like(cell.bias_ih)}
        )
        layers.append(layer)
    length = len(ids) // B
    data = torch.from_numpy(ids[: B * length].astype(np.int64)).view(B, length)
    states: list = [None] * len(layers)
    costs, steps = 0.0, 0
    with torch.inference_mode():
        for k in range((length - 1) // T):
            hidden = model.embedding(data[:, k * T : (k + 1) * T].t())
            for number, layer in enumerate(layers):
                hidden, states[number] = layer(hidden, states[number])
            targets = data[:, k * T + 1 : (k + 1) * T + 1].t()
            costs += F.cross_entropy(model.decoder(hidden).flatten(0, 1), targets.flatten()).item() * T
            steps += T
    result = evaluate_paper(model, Windows(ids, B, T))
    assert result.tokens == steps * B
    assert result.perplexity == pytest.approx(math.exp(costs / steps), rel=1e-5)


def test_the_run_evaluates_what_it_held_out(toy_run: Run) -> None:
    answer = toy_run.evaluate()
    test = toy_run.manifest["corpus"]["splits"]["test"]
    assert answer["tokens"] == test["tokens"] - 1
    assert answer["perplexity"] == pytest.approx(math.exp(answer["nll_nats"] / answer["tokens"]))
    assert answer["bits_per_character"] == pytest.approx(answer["nll_nats"] / math.log(2) / answer["characters"])
    assert answer["perplexity"] == pytest.approx(toy_run.manifest["results"]["test"]["perplexity"])
    paper = toy_run.evaluate("valid", "paper")
    assert paper["protocol"] == "paper"
    assert paper["perplexity"] == pytest.approx(toy_run.manifest["results"]["valid_perplexity"])
    valid = prepare(open_corpus("toy"), Vocabulary("word", 10_000, 2)).ids["valid"]
    counted = np.concatenate([targets.numpy().ravel() for _, targets in Windows(valid, 20, 20)])
    assert paper["tokens"] == len(counted)
    assert paper["characters"] == toy_run.tokenizer.characters(counted)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"protocol": "exakt"}, "no protocol 'exakt'"),
        ({"split": "tset"}, "no split 'tset'; there are train, valid, test"),
        ({"data": "toy", "split": "dev"}, "no split 'dev'"),
        ({"data": "nowhere.txt"}, "no corpus or file 'nowhere.txt'"),
    ],
)
def test_what_cannot_be_evaluated_is_said(toy_run: Run, arguments: dict[str, str], expected: str) -> None:
    with pytest.raises(UnrolledError, match=expected):
        toy_run.evaluate(**arguments)


@given(n=integers(1, 4), length=integers(2, 30), seed=integers(0, 9))
def test_ngrams_are_those_of_counts(n: int, length: int, seed: int) -> None:
    source = np.random.default_rng(seed)
    train, ids = source.integers(0, 3, 50).astype(np.uint8), source.integers(0, 3, length).astype(np.uint8)
    text, nll_nats = train.tolist(), 0.0
    for position in range(1, length):
        order = min(n, position + 1)
        context = ids[position - order + 1 : position].tolist()
        after = [text[k + order - 1] for k in range(len(text) - order + 1) if text[k : k + order - 1] == context]
        nll_nats -= math.log((after.count(int(ids[position])) + 1) / (len(after) + 3))
    assert ngram_perplexity(train, ids, 3, n) == pytest.approx(math.exp(nll_nats / (length - 1)))


def test_a_jordan_network_is_evaluated_by_its_own_output_or_by_the_teachers(ids: np.ndarray) -> None:
    torch.manual_seed(3)
    model = LanguageModel(40, 0, [6], cell="jordan", init_scale=1.0).train()
    own, forced = (evaluate_exact(model, ids, teacher_forced=teacher) for teacher in (False, True))
    assert own.nll_nats == pytest.approx(one_at_a_time(model.eval(), ids), rel=1e-5)
    with teacher_forced(True):
        assert forced.nll_nats == pytest.approx(one_at_a_time(model, ids), rel=1e-5)
    assert own.nll_nats != pytest.approx(forced.nll_nats, rel=1e-3)
    inputs = torch.from_numpy(ids.astype(np.int64))
    for place in (40, 41):  # what a forced network says depends on the token before alone
        with teacher_forced(True), torch.no_grad():
            whole, _ = model(inputs[:60, None], model.initial_state(1))
            alone, _ = model(inputs[place, None, None], model.initial_state(1))
        torch.testing.assert_close(whole[place], alone[0])


def test_an_evaluation_has_no_say_in_what_another_thread_is_fed(ids: np.ndarray) -> None:
    model = LanguageModel(40, 0, [6], cell="jordan", init_scale=1.0).eval()
    expected = evaluate_exact(model, ids)
    with teacher_forced(True), ThreadPoolExecutor(1) as pool:
        assert pool.submit(evaluate_exact, model, ids).result() == expected


def test_an_exact_evaluation_drops_no_units(ids: np.ndarray) -> None:
    model = LanguageModel(40, 8, [8], dropout=0.5).train()
    assert evaluate_exact(model, ids) == evaluate_exact(model.eval(), ids)


def test_unigram_is_that_of_counts() -> None:
    train, test = np.array([0, 0, 0, 1], np.uint8), np.array([2, 0, 1, 2], np.uint8)
    probabilities = np.array([4, 2, 1]) / 7
    expected = math.exp(-sum(math.log(probabilities[id]) for id in (0, 1, 2)) / 3)
    assert ngram_perplexity(train, test, 3, 1) == pytest.approx(expected)
