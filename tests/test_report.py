"""The report is one page that needs nothing else."""

import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

import unrolled
from unrolled import Run, UnrolledError
from unrolled.report import write_report


class Page(HTMLParser):
    """Every opened tag is closed, and every address that is followed without asking."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_a_report_is_one_page_with_everything_in_it(toy_run: Run, tmp_path: Path) -> None:
    write_report([toy_run], tmp_path / "report.html", words=30)
    page = read(tmp_path / "report.html")
    assert all(address.startswith("#") for address in page.addresses)
    for content in ("Perplexity", "Learning rate", "Gradient norm", "Tokens per second", "Maps", "hidden_sizes"):
        assert content in page.text
    assert toy_run.manifest["corpus"]["splits"]["train"]["sha256"] in page.text
    assert "dog" in page.text  # on the map
    samples = re.findall(r"epoch (\d+), step", page.text)
    assert samples == ["1", "2"]
    assert f"{toy_run.manifest['results']['test']['perplexity']:,.3f}" in page.text


def test_several_runs_stand_side_by_side(toy_run: Run, character_run: Run, tmp_path: Path) -> None:
    write_report([toy_run, character_run], tmp_path / "report.html", words=0)
    page = read(tmp_path / "report.html")
    assert page.text.count("hidden_sizes") == 2
    assert "Maps" not in page.text
    marked = re.findall(r"<mark>(.*?)</mark>", (tmp_path / "report.html").read_text())
    assert {"cell = &quot;lstm&quot;", "cell = &quot;gru&quot;"} <= set(marked)
    assert not any(line.startswith("seed") for line in marked)
    assert {"    64,", "    48,"} <= set(marked)  # of hidden_sizes


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1, "epoch": 1}',
        '{"step": 1, "epoch": 0}',
        '{"step": 0, "epoch": 1, "nll_nats_per_token": 3.0, "train_perplexity": 9.0}',
        '{"step": 1, "epoch": 1, "train_perplexity": 0}',
        '{"step": 1, "epoch": 1, "train_perplexity": 9.0, "sample": "\\ud800"}',
    ],
)
def test_a_record_of_strange_lines_is_reported_on(toy_run: Run, tmp_path: Path, line: str) -> None:
    run = unrolled.load(shutil.copytree(toy_run.path, tmp_path / "run"))
    (run.path / "metrics.jsonl").write_text(line + "\n")
    write_report([run], tmp_path / "report.html", words=0)
    read(tmp_path / "report.html")


def test_a_device_is_not_written_over(toy_run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnrolledError, match="no file that can be written over"):
        write_report([toy_run], tmp_path / "pipe", words=0)
    (tmp_path / "link.html").symlink_to(tmp_path / "real.html")
    write_report([toy_run], tmp_path / "link.html", words=0)
    assert (tmp_path / "link.html").is_symlink()
    read(tmp_path / "real.html")
