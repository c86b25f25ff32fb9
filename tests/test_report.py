"""The report is one page that needs nothing else; labels on a map do not overlap."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import integers

from unrolled import Run, UnrolledError
from unrolled.report import place_labels, write_map, write_report


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


@pytest.mark.parametrize("ending", ["png", "svg", "pdf", "html"])
def test_a_map_is_drawn_in_the_form_that_its_name_says(ending: str, tmp_path: Path) -> None:
    words = ["the", "a", "<b>", "&", "naïve", "\n"]
    places = np.random.default_rng(0).normal(size=(6, 2))
    assert write_map(words, places, tmp_path / f"map.{ending}") == 0
    content = (tmp_path / f"map.{ending}").read_bytes()
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "html": b"<!doctype html>"}
    assert content.startswith(starts[ending])
    if ending == "html":
        assert not re.search(rb"""<(script|link)[^>]*(src|href)=["']http""", content)


def test_another_ending_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnrolledError, match="a map is a file in"):
        write_map(["a"], np.zeros((1, 2)), tmp_path / "map.docx")


@given(count=integers(0, 60), size=integers(1, 60), seed=integers(0, 5))
def test_labels_overlap_neither_each_other_nor_dots_nor_the_edge(count: int, size: int, seed: int) -> None:
    source = np.random.default_rng(seed)
    dots = source.uniform(0, 300, (count, 2))
    sizes = np.column_stack([source.uniform(1, 2 * size, count), np.full(count, size / 2)])
    corners = place_labels(dots, sizes, np.array([0.0, 0.0, 300.0, 300.0]))
    placed = np.flatnonzero(np.isfinite(corners[:, 0]))
    boxes = {number: (*corners[number], *(corners[number] + sizes[number])) for number in placed.tolist()}
    for number, (left, bottom, right, top) in boxes.items():
        assert left >= 0
        assert bottom >= 0
        assert right <= 300
        assert top <= 300
        for other, (left_of, bottom_of, right_of, top_of) in boxes.items():
            assert other == number or left >= right_of or left_of >= right or bottom >= top_of or bottom_of >= top
        inside = (dots > (left, bottom)).all(axis=1) & (dots < (right, top)).all(axis=1)
        assert set(np.flatnonzero(inside).tolist()) <= {number}
    if count == 1:
        assert len(placed) == 1 or size > 100
