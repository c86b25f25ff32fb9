"""What `train` shows: everything in one line of a terminal, plain lines elsewhere."""

import io
import re
import sys
from typing import Any

import pytest

from unrolled.progress import Display

STEP = {
    "event": "step",
    "step": 7_000,
    "epoch": 13,
    "window": 60,
    "windows": 132,
    "tokens_an_epoch": 929_560,
    "train_perplexity": 711.724,
    "nll_nats_per_token": 6.57,
    "learning_rate": 0.003797,
    "grad_norm": 18.4711,
    "tokens_per_second": 114_438.2,
}
EPOCH = STEP | {
    "event": "epoch",
    "valid_perplexity": 5_120.9,
    "valid_protocol": "paper",
    "elapsed_s": 10_007.2,
    "best": True,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, *events: dict[str, Any]) -> list[str]:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with Display() as display:
        for event in events:
            display(event)
        display.live.refresh()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).replace("\r", "\n").splitlines()


def test_a_terminal_of_80_columns_shows_everything_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(Terminal(), monkeypatch, STEP, EPOCH)
    assert max(map(len, lines)) <= 80
    assert any(
        re.search(r"epoch 13 \S+ perplexity 711\.7 114,438/s rate 0\.0038 gradient 18\.5 [-\d:]+", line)
        for line in lines
    )
    assert any("train 711.72  valid 5,120.90 (paper) rate 0.0038 114,438/s 10,007 s *" in line for line in lines)


def test_elsewhere_there_are_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(io.StringIO(), monkeypatch, STEP, EPOCH)
    assert lines[0] == (
        "epoch  13   45%  perplexity    711.72   114,438 tokens/s  rate 0.003797  gradient 18.5  4 s left of it"
    )
    assert len(lines) == 2
