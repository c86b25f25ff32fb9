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


def shown(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, *events: dict[str, Any], **environment: str
) -> list[str]:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
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


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("FORCE_COLOR", "1")])
def test_a_terminal_that_cannot_move_its_cursor_and_a_file_told_to_be_one_have_plain_lines(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    stream = Terminal() if name == "TERM" else io.StringIO()
    lines = shown(stream, monkeypatch, STEP, EPOCH, **{name: value})
    assert len(lines) == 2
    assert "45%" in lines[0]


def test_what_is_answered_meanwhile_goes_where_answers_go(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Display(on_epoch=lambda event: print("answer")) as display:
        display(STEP)
        display(EPOCH)
    assert capsys.readouterr().out == "answer\n"


def test_a_text_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(io.StringIO(), monkeypatch, {"event": "note", "text": "a:b:c :x: [bold]"})
    assert lines == ["a:b:c :x: [bold]"]
