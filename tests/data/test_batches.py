"""ids -> streams -> windows, as drawn in the module."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers

from unrolled import UnrolledError
from unrolled.data import batches
from unrolled.data.batches import Windows
from unrolled.data.dataset import prepare
from unrolled.data.text import open_corpus
from unrolled.data.tokens import Vocabulary


def test_windows_are_those_of_the_drawing() -> None:
    windows = list(Windows(np.arange(14, dtype=np.uint8), batch_size=2, num_steps=3))
    assert [w[0].T.tolist() for w in windows] == [[[0, 1, 2], [7, 8, 9]], [[3, 4, 5], [10, 11, 12]]]
    assert [w[1].T.tolist() for w in windows] == [[[1, 2, 3], [8, 9, 10]], [[4, 5, 6], [11, 12, 13]]]
    assert windows[0][0].dtype == torch.int64


@given(N=integers(2, 300), B=integers(1, 7), T=integers(1, 11))
def test_windows_are_those_of_the_reference_reader(N: int, B: int, T: int) -> None:
    ids = np.random.default_rng(N).integers(0, 50, N)
    batch_length = N // B
    epoch_size = (batch_length - 1) // T
    if epoch_size < 1:
        with pytest.raises(UnrolledError, match="too few"):
            Windows(ids, B, T)
        return
    data = ids[: B * batch_length].reshape(B, batch_length)
    windows = Windows(ids, B, T)
    assert len(windows) == epoch_size
    assert windows.num_targets == epoch_size * T * B
    np.testing.assert_array_equal(windows.targets, data[:, 1 : epoch_size * T + 1])
    for k, (inputs, targets) in enumerate(windows):
        np.testing.assert_array_equal(inputs.T.numpy(), data[:, k * T : (k + 1) * T])
        np.testing.assert_array_equal(targets.T.numpy(), data[:, k * T + 1 : (k + 1) * T + 1])


@pytest.mark.parametrize("ids_at_once", [1, 3 * 7 * 4, 1 << 15])
def test_a_pass_broken_off_goes_on_from_its_cursor(monkeypatch: pytest.MonkeyPatch, ids_at_once: int) -> None:
    monkeypatch.setattr(batches, "_IDS_AT_ONCE", ids_at_once)
    windows = Windows(np.arange(1000), 3, 7)
    whole, rest = [windows[k] for k in range(len(windows))], list(windows.since(5))
    assert len(rest) == len(whole) - 5
    for (a, b), (c, d) in zip(whole[5:], rest, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


@pytest.mark.parametrize("index", [-1, 14])
def test_a_window_outside_is_an_error(index: int) -> None:
    with pytest.raises(IndexError):
        Windows(np.arange(100), 1, 7)[index]


def test_ptb_is_read_as_the_reference_reads_it(ptb: str) -> None:
    dataset = prepare(open_corpus(ptb), Vocabulary("word", 10_000))
    assert {split: len(ids) for split, ids in dataset.ids.items()} == {
        "train": 929_589,
        "valid": 73_760,
        "test": 82_430,
    }
    assert len(dataset.tokenizer) == 10_000
    assert dataset.ids["train"].dtype == np.uint16
    assert dataset.ids["train"][:5].tolist() == [9970, 9971, 9972, 9974, 9975]
    inputs, _ = Windows(dataset.ids["train"], batch_size=60, num_steps=20)[0]
    assert inputs[:10, 1].tolist() == [901, 33, 3361, 8, 1279, 437, 597, 6, 261, 4276]
    assert Windows(dataset.ids["train"], 20, 20).num_targets == 929_200
