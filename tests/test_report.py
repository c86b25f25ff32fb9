"""The report is one page that needs nothing else."""

import re
from html.parser import HTMLParser
from pathlib import Path

from unrolled import Run
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
