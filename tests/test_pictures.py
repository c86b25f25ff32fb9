"""Curves show what was recorded; labels on a map do not overlap."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import integers

from unrolled import UnrolledError
from unrolled.pictures import map_figure, perplexity_chart, place_labels, svg, write_map

NATS = [3.0, 2.5, 2.0, 1.5, 1.8, 1.2, 1.1, 1.0]
"""Per token over each quarter of two epochs of 400 steps."""


def records() -> list[dict[str, float]]:
    """As `train` writes them: the perplexity of the epoch so far, every hundred steps and at the epoch's end."""
    found: list[dict[str, float]] = []
    for quarter in range(8):
        epoch, so_far = quarter // 4 + 1, NATS[quarter // 4 * 4 : quarter + 1]
        record = {"step": 100 * (quarter + 1), "epoch": epoch, "train_perplexity": math.exp(sum(so_far) / len(so_far))}
        found.append(record | {"nll_nats_per_token": so_far[-1]})
        if quarter % 4 == 1:
            found[-1]["valid_perplexity"] = 9.0  # one within the epoch
            found.append(found[-1] | {"step": found[-1]["step"] + 1})  # too near the one before to be a curve
        if quarter % 4 == 3:
            found.append(record | {"valid_perplexity": 7.0})
    return found


def test_the_curve_of_train_is_what_each_stretch_cost_and_not_the_mean_so_far() -> None:
    (axes,) = perplexity_chart({"run": records()}).axes
    train, valid = axes.get_lines()
    np.testing.assert_allclose(np.log(np.asarray(train.get_ydata(), float)), NATS, rtol=1e-9)
    np.testing.assert_allclose(np.asarray(train.get_xdata(), float), np.arange(1, 9) / 4)
    assert list(np.asarray(valid.get_ydata())) == [9.0, 9.0, 7.0, 9.0, 9.0, 7.0]
    whole = math.exp(sum(NATS[4:]) / 4)
    assert [text.get_text() for text in axes.texts] == [f"train {whole:.4g}", "valid 7"]


def test_what_leaves_the_range_of_a_number_is_no_point_of_the_curve() -> None:
    worse = [{"step": 5, "epoch": 1, "train_perplexity": math.exp(100)}]
    worse += [{"step": 10, "epoch": 1, "train_perplexity": math.exp(500)}, {"step": 10, "epoch": 1}]
    worse[-1] |= {"train_perplexity": math.exp(500), "valid_perplexity": math.exp(500)}
    (axes,) = perplexity_chart({"run": worse}).axes
    assert len(np.asarray(axes.get_lines()[0].get_xdata())) == 1


def test_a_picture_in_a_page_takes_the_pages_colours_and_is_the_same_every_time() -> None:
    one, other = (svg(perplexity_chart({"a": records(), "b": records()})) for _ in range(2))
    assert one == other
    assert "currentColor" in one
    assert "a 7" in one


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


def test_a_word_with_dollars_is_a_word() -> None:
    words = ["$x$", "$$", "$\\nowhere$", "^{", "a_b"]
    drawn = svg(map_figure(words, np.random.default_rng(1).normal(size=(5, 2)))[0])
    assert all(f">{word}<" in drawn for word in words)


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
