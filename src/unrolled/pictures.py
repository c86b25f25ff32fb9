"""Curves of a training and maps of tokens, drawn by matplotlib (and by plotly where one can zoom in).

As SVG a picture takes the text colour of the page it stands in, so it is right on light and dark.
"""

import html
import io
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unrolled.data.tokens import shown
from unrolled.errors import UnrolledError
from unrolled.files import write_whole
from unrolled.metrics import epochs_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#4c78a8", "#e8833a", "#54a24b", "#b279a2", "#9d755d", "#72b7b2")
_INK = "#010203"  # stands for the page's text colour
_WIDEST_MAP, _MAP_FONT = 11.0, 8.0
_SHORTEST = 0.02
"""Of an epoch: over less of it than this the perplexity of train is that of a few windows, and no curve."""

Records = list[dict[str, Any]]


# ------------------------------------------------------------------------------------------------ curves


def perplexity_chart(metrics: dict[str, Records]) -> "Figure":
    """Train and valid perplexity over epochs, of one run or several, the last value written beside each curve.

    Train is drawn as the mean since the record before, its value is that of the whole epoch; valid is marked where it
    was taken.

    Args:
        metrics: the records of each run (`metrics.read_metrics`) by its name.
    """
    figure, axes = _empty_chart()
    ends = []
    for number, (name, records) in enumerate(metrics.items()):
        alone = len(metrics) == 1
        for split, points in (("train", _train_points(records)), ("valid", _points(records, "valid_perplexity"))):
            x, y = points
            if not len(x):
                continue
            colour = COLOURS[(split == "valid" if alone else number) % len(COLOURS)]
            faint = split == "train" and not alone  # several runs are told apart by their valid curves
            marker = "o" if split == "valid" else ""
            axes.plot(x, y, marker=marker, markersize=3, color=colour, linewidth=1.2, alpha=0.5 if faint else 1)
            if not faint:
                value = _points(records, f"{split}_perplexity")[1][-1]
                ends.append((y[-1], f"{split if alone else name} {value:,.4g}", colour))
    axes.set_yscale("log")
    _plain_log_ticks(axes)
    _label_ends(axes, ends)
    return figure


def chart(metrics: dict[str, Records], field: str) -> "Figure":
    """One field of the records over epochs, a curve for each run."""
    figure, axes = _empty_chart()
    ends = []
    for number, (name, records) in enumerate(metrics.items()):
        x, y = _points(records, field)
        if not len(x):
            continue
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(x, y, color=colour, linewidth=1.2)
        if len(metrics) > 1:
            ends.append((y[-1], name, colour))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.6g}")
    _label_ends(axes, ends)
    return figure


def _empty_chart() -> tuple["Figure", "Axes"]:
    figure, axes = _new_figure(5.6, 3.2)
    axes.set_xlabel("epoch")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    return figure, axes


def _epoch_steps(records: Records) -> float:
    ends = epochs_of(records)
    return ends[0]["step"] / ends[0]["epoch"] if ends else max((record["step"] for record in records), default=1)


def _points(records: Records, field: str) -> tuple[np.ndarray, np.ndarray]:
    """A field over epochs, where it was recorded."""
    steps = _epoch_steps(records)
    points = [(record["step"] / steps, record[field]) for record in records if record.get(field) is not None]
    return np.array([x for x, _ in points]), np.array([y for _, y in points])


def _train_points(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Perplexity of train between records; what is recorded is that of the epoch so far."""
    steps, x, y = _epoch_steps(records), [], []
    epoch, before, nats_before = 0, 0.0, 0.0
    for record in records:
        begin = (record["epoch"] - 1) * steps
        if record["epoch"] != epoch:
            epoch, before, nats_before = record["epoch"], begin, 0.0
        if not (record.get("train_perplexity") or 0) > 0 or record["step"] < before + max(_SHORTEST * steps, 1):
            continue
        nats = math.log(record["train_perplexity"]) * (record["step"] - begin)
        if (mean := (nats - nats_before) / (record["step"] - before)) < 700:  # beyond, e to it is no float
            x.append(record["step"] / steps)
            y.append(math.exp(mean))
        before, nats_before = record["step"], nats
    return np.array(x), np.array(y)


def _plain_log_ticks(axes: "Axes") -> None:
    """Ticks at round numbers that read as they are, the more of them the less the axis spans."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axes.get_ylim()
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high / low < 30 else (1.0, 3.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _label_ends(axes: "Axes", ends: list[tuple[float, str, str]]) -> None:
    """Names at the right ends of curves, moved apart where they would touch."""
    if not ends:
        return
    pixels = axes.transData.transform([(0, y) for y, _, _ in ends])
    heights = axes.transAxes.inverted().transform(pixels)[:, 1].tolist()
    step = 0.06  # a line of text as a share of the axes' height
    lowest = -np.inf
    for place, (_, text, colour) in sorted(zip(heights, ends, strict=True)):
        lowest = max(place, lowest + step)
        where = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center"}
        axes.annotate(text, (1, lowest), (4, 0), **where, color=colour, parse_math=False)


def _new_figure(width: float, height: float) -> tuple["Figure", "Axes"]:
    """An empty picture of so many inches, drawn in the page's text colour.

    Raises:
        UnrolledError: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnrolledError("pictures need matplotlib: pip install 'unrolled[plots]'") from error
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    style = dict.fromkeys(ink, _INK) | {"svg.fonttype": "none", "svg.hashsalt": "unrolled", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def svg(figure: "Figure") -> str:
    """A picture as SVG to stand in a page: the page's ink, no background, no fixed size."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "unrolled"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)


def write_picture(figure: "Figure", path: Path) -> None:
    """A picture on white, in the form that the file's ending names: .png, .svg or .pdf."""
    import matplotlib

    buffer, kind = io.BytesIO(), path.suffix.lower().lstrip(".")
    with matplotlib.rc_context({"svg.hashsalt": "unrolled"}):  # the same picture every time
        metadata = {} if kind == "png" else {"Date" if kind == "svg" else "CreationDate": None}
        figure.savefig(buffer, format=kind, dpi=150, facecolor="white", metadata=metadata)
    write_whole(Path(os.path.realpath(path)), buffer.getvalue())


# ------------------------------------------------------------------------------------------------ maps


def write_map(words: list[str], places: np.ndarray, path: Path) -> int:
    """The map as a picture (PNG, SVG or PDF) or an interactive page (HTML), by the file's ending.

    Returns:
        How many words had no room for their label, and are dots.

    Raises:
        UnrolledError: another ending, or matplotlib or plotly is missing.
    """
    check_map_name(path)
    figure, sides = map_figure(words, places)
    if path.suffix.lower() == ".html":
        write_whole(Path(os.path.realpath(path)), _interactive_map(words, places, sides).encode())
    else:
        write_picture(figure, path)
    return sides.count("")


def check_map_name(path: Path) -> None:
    """Refuses what `write_map` cannot write, before there is a map."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf", ".html"):
        raise UnrolledError(f"{path}: a map is a file in .png, .svg, .pdf or .html")


def map_figure(words: list[str], places: np.ndarray, widest: float = _WIDEST_MAP) -> tuple["Figure", list[str]]:
    """The map, as large as its words need, at most `widest` inches; each label beside its dot where there is room.

    Returns:
        The picture, and on which side of its dot each label stands ("middle right"), "" where there is no room.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    inches = min(widest, 1.0 + 0.6 * len(words) ** 0.5)
    figure, axes = _new_figure(inches, inches)
    canvas = FigureCanvasAgg(figure)
    axes.set_axis_off()
    axes.scatter(places[:, 0], places[:, 1], s=5, color=COLOURS[0])
    figure.draw_without_rendering()
    dots = axes.transData.transform(places)
    labels = [
        axes.annotate(shown(word), place, fontsize=_MAP_FONT, parse_math=False)  # a $ is a $
        for word, place in zip(words, places, strict=True)
    ]
    renderer = canvas.get_renderer()
    extents = [label.get_window_extent(renderer) for label in labels]
    sizes = np.array([(extent.width, extent.height) for extent in extents])
    corners = place_labels(dots, sizes, bounds=np.array([0.0, 0.0, *figure.bbox.size]))
    to_data = axes.transData.inverted()
    for label, corner in zip(labels, corners, strict=True):
        if np.isnan(corner).any():
            label.remove()
        else:
            x, y = to_data.transform(corner).tolist()
            label.xyann = (x, y)
            label.set_verticalalignment("bottom")
    offsets = [*zip((corners - dots).tolist(), sizes.tolist(), strict=True)]
    return figure, [_side(dx, dy, width, height) for (dx, dy), (width, height) in offsets]


def _side(dx: float, dy: float, width: float, height: float) -> str:
    """Where a label lies whose lower left corner is (dx, dy) from its dot, in plotly's words."""
    if math.isnan(dx):
        return ""
    vertical = "top" if dy > 0 else "bottom" if dy + height < 0 else "middle"
    return f"{vertical} {'right' if dx > 0 else 'left' if dx + width < 0 else 'center'}"


def place_labels(dots: np.ndarray, sizes: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Where labels go so that none overlaps another, a dot of another, or the edge.

    Args:
        dots: (N, 2), in pixels.
        sizes: (N, 2), width and height of each label.
        bounds: (4,), left, bottom, right, top.

    Returns:
        The lower left corners (N, 2), NaN for a label that has no room; the first come first.
    """
    gap = 3.0
    corners = np.full_like(dots, np.nan, dtype=float)
    taken = np.concatenate([dots - 1.5, dots + 1.5], axis=1)  # boxes (left, bottom, right, top); the dots come first
    for number, ((x, y), (width, height)) in enumerate(zip(dots, sizes, strict=True)):
        beside = ((gap, -height / 2), (-gap - width, -height / 2), (-width / 2, gap), (-width / 2, -gap - height))
        across = ((gap, gap), (-gap - width, gap), (gap, -gap - height), (-gap - width, -gap - height))
        for dx, dy in (*beside, *across):
            box = np.array([x + dx, y + dy, x + dx + width, y + dy + height])
            inside = (box[:2] >= bounds[:2]).all() and (box[2:] <= bounds[2:]).all()
            touching = (taken[:, :2] < box[2:]).all(axis=1) & (taken[:, 2:] > box[:2]).all(axis=1)
            if inside and set(np.flatnonzero(touching).tolist()) <= {number}:
                corners[number] = box[:2]
                taken = np.vstack([taken, box])
                break
    return corners


def _interactive_map(words: list[str], places: np.ndarray, sides: list[str]) -> str:
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise UnrolledError("an interactive map needs plotly: pip install 'unrolled[plots]'") from error
    names = [html.escape(shown(word), quote=False) for word in words]
    figure = go.Figure(
        go.Scatter(
            x=places[:, 0],
            y=places[:, 1],
            mode="markers+text",
            text=[name if side else "" for name, side in zip(names, sides, strict=True)],
            hovertext=[f"{name} ({rank})" for rank, name in enumerate(names, start=1)],
            hoverinfo="text",
            textposition=[side or "middle right" for side in sides],
            textfont_size=10,
            marker={"size": 4, "color": COLOURS[0]},
        )
    )
    size = int(_WIDEST_MAP * 100)
    hidden = {"visible": False}
    figure.update_layout(
        title="Tokens by likeness (t-SNE); drag to zoom, double-click to see all",
        width=size,
        height=size,
        xaxis=hidden,
        yaxis=hidden,
        plot_bgcolor="white",
        dragmode="zoom",
    )
    page = figure.to_html(include_plotlyjs=True, full_html=True, config={"displaylogo": False, "scrollZoom": True})
    return page.replace("<head>", "<head><title>Unrolled: a map of tokens</title>", 1)
