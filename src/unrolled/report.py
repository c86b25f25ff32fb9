"""A run, or several, as pictures and one self-contained HTML page; the map of a model's tokens.

Pictures are drawn by matplotlib as SVG that takes the page's own text colour, so they are right on light and dark.
"""

import html
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unrolled.errors import UnrolledError
from unrolled.files import write_whole
from unrolled.folder import read_metrics
from unrolled.inference.embeddings import map_tokens
from unrolled.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#4c78a8", "#e8833a", "#54a24b", "#b279a2", "#9d755d", "#72b7b2")
_INK = "#010203"  # stands for the page's text colour
_MAP_INCHES, _MAP_FONT = 11.0, 8.0

Records = list[dict[str, Any]]


def write_report(runs: Sequence[Run], path: Path, words: int = 300) -> None:
    """One HTML page about a run, or several laid side by side.

    Args:
        runs: opened run folders; their names tell them apart.
        path: the file to write.
        words: how many tokens the maps show; 0 for no maps.

    Raises:
        UnrolledError: matplotlib or scikit-learn is missing.
    """
    names = _names(runs)
    metrics = {name: read_metrics(run.path) for name, run in zip(names, runs, strict=True)}
    sections = [_table(_summary(runs, names)), *_curves(metrics)]
    if words:
        sections += [
            "<h2>Maps</h2>",
            _beside([(name, _map(run, words)) for name, run in zip(names, runs, strict=True)]),
        ]
    sections += ["<h2>Samples</h2>", _beside([(name, _samples(metrics[name])) for name in names])]
    sections += [
        "<h2>Recipes</h2>",
        _beside([(name, _recipe(run, runs)) for name, run in zip(names, runs, strict=True)]),
    ]
    sections += ["<h2>Provenance</h2>", _beside([(n, _provenance(run)) for n, run in zip(names, runs, strict=True)])]
    title = "Unrolled: " + ", ".join(names)
    page = _PAGE.format(title=html.escape(title), body="\n".join(sections))
    write_whole(path, page.encode())


def write_map(words: list[str], places: np.ndarray, path: Path) -> int:
    """The map as a picture (PNG, SVG or PDF) or an interactive page (HTML), by the file's ending.

    Returns:
        How many words had no room for their label, and are dots.

    Raises:
        UnrolledError: another ending, or matplotlib or plotly is missing.
    """
    kind = path.suffix.lower().lstrip(".")
    if kind not in ("png", "svg", "pdf", "html"):
        raise UnrolledError(f"{path}: a map is a file in .png, .svg, .pdf or .html")
    figure, labelled = _map_figure(words, places)
    if kind == "html":
        content = _interactive_map(words, places, labelled).encode()
    else:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=150, facecolor="white")
        content = buffer.getvalue()
    write_whole(path, content)
    return len(words) - int(labelled.sum())


# ------------------------------------------------------------------------------------------------ curves


def _curves(metrics: dict[str, Records]) -> list[str]:
    charts = [
        ("Perplexity", lambda axes: perplexity_curves(axes, metrics)),
        ("Learning rate", lambda axes: _curve(axes, metrics, "learning_rate")),
        ("Gradient norm before clipping", lambda axes: _curve(axes, metrics, "grad_norm")),
        ("Tokens per second", lambda axes: _curve(axes, metrics, "tokens_per_second")),
    ]
    figures = [f"<figure><figcaption>{title}</figcaption>{_svg(_chart(draw))}</figure>" for title, draw in charts]
    return ["<h2>Curves</h2>", f'<div class="charts">{"".join(figures)}</div>']


def _chart(draw: Callable[["Axes"], None]) -> "Figure":
    figure, axes = new_figure(5.6, 3.2)
    draw(axes)
    axes.set_xlabel("epoch")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    return figure


def perplexity_curves(axes: "Axes", metrics: dict[str, Records]) -> None:
    """Train and valid perplexity over epochs, the last value written beside each curve."""
    ends = []
    for number, (name, records) in enumerate(metrics.items()):
        for split, style in (("train", "--"), ("valid", "-")):
            colour = COLOURS[(number if len(metrics) > 1 else split == "valid") % len(COLOURS)]
            x, y = _points(records, f"{split}_perplexity")
            if not len(x):
                continue
            axes.plot(x, y, style if len(metrics) > 1 else "-", color=colour, linewidth=1.4)
            ends.append(
                (y[-1], f"{split} {y[-1]:,.4g}" if len(metrics) == 1 else f"{name} {split} {y[-1]:,.4g}", colour)
            )
    axes.set_yscale("log")
    _plain_log_ticks(axes)
    _label_ends(axes, ends)


def _curve(axes: "Axes", metrics: dict[str, Records], field: str) -> None:
    ends = []
    for number, (name, records) in enumerate(metrics.items()):
        x, y = _points(records, field)
        if not len(x):
            continue
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(x, y, color=colour, linewidth=1.2)
        if len(metrics) > 1:
            ends.append((y[-1], name, colour))
    if field != "learning_rate":
        axes.set_ylim(bottom=0)
    _label_ends(axes, ends)


def _points(records: Records, field: str) -> tuple[np.ndarray, np.ndarray]:
    """A field over epochs; perplexity of train is that of the epoch so far, so only its end counts."""
    ends = [record for record in records if "nll_nats_per_token" not in record]
    epoch_steps = ends[0]["step"] / ends[0]["epoch"] if ends else max((r["step"] for r in records), default=1)
    chosen = ends if field == "train_perplexity" and ends else records
    points = [(r["step"] / epoch_steps, r[field]) for r in chosen if r.get(field) is not None]
    return np.array([x for x, _ in points]), np.array([y for _, y in points])


def _plain_log_ticks(axes: "Axes") -> None:
    """Ticks at round numbers that read as they are, for perplexities span a factor of ten, not a thousand."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


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
        axes.annotate(
            text, (1, lowest), (4, 0), xycoords="axes fraction", textcoords="offset points", va="center", color=colour
        )


def new_figure(width: float, height: float) -> tuple["Figure", "Axes"]:
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


def _svg(figure: "Figure") -> str:
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


# ------------------------------------------------------------------------------------------------ maps


def _map_figure(words: list[str], places: np.ndarray) -> tuple["Figure", np.ndarray]:
    """The map, each label beside its dot where there is room for it; and which (N,) have one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, axes = new_figure(_MAP_INCHES, _MAP_INCHES)
    canvas = FigureCanvasAgg(figure)
    axes.set_axis_off()
    axes.scatter(places[:, 0], places[:, 1], s=5, color=COLOURS[0])
    figure.draw_without_rendering()
    dots = axes.transData.transform(places)
    labels = [axes.annotate(shown(word), place, fontsize=_MAP_FONT) for word, place in zip(words, places, strict=True)]
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
    return figure, np.isfinite(corners[:, 0])


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


def _interactive_map(words: list[str], places: np.ndarray, labelled: np.ndarray) -> str:
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise UnrolledError("an interactive map needs plotly: pip install 'unrolled[plots]'") from error
    names = [html.escape(shown(word)) for word in words]
    figure = go.Figure(
        go.Scatter(
            x=places[:, 0],
            y=places[:, 1],
            mode="markers+text",
            text=[name if shows else "" for name, shows in zip(names, labelled.tolist(), strict=True)],
            hovertext=[f"{name} ({rank})" for rank, name in enumerate(names, start=1)],
            hoverinfo="text",
            textposition="middle right",
            textfont_size=10,
            marker={"size": 4, "color": COLOURS[0]},
        )
    )
    size = int(_MAP_INCHES * 100)
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
    return figure.to_html(include_plotlyjs=True, full_html=True, config={"displaylogo": False, "scrollZoom": True})


def _map(run: Run, words: int) -> str:
    try:
        tokens, places = map_tokens(run.model, run.tokenizer, words)
    except UnrolledError as error:
        return f"<p>{html.escape(str(error))}</p>"
    figure, _ = _map_figure(tokens, places)
    return _svg(figure)


def shown(token: str) -> str:
    """A token as one can see it: white space by its name."""
    return token if token.strip() == token and token.isprintable() and token else repr(token)[1:-1].replace(" ", "␣")


# ------------------------------------------------------------------------------------------------ tables and texts


def _names(runs: Sequence[Run]) -> list[str]:
    names = [run.folder.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _summary(runs: Sequence[Run], names: list[str]) -> list[list[str]]:
    """The first column names the figure, each other is a run."""
    rows: list[list[str]] = [["", *names]]
    figures: list[tuple[str, Callable[[Run], str]]] = [
        ("recipe", lambda run: run.recipe.name),
        ("status", lambda run: run.manifest["status"]),
        ("parameters", lambda run: f"{run.model.num_parameters():,}"),
        (
            "corpus",
            lambda run: " ".join(filter(None, [run.manifest["corpus"]["name"], run.manifest["corpus"]["note"]])),
        ),
        ("epochs", lambda run: str(run.manifest.get("epochs", "–"))),
        ("training", lambda run: f"{run.manifest.get('training_s', 0):,.0f} s"),
        ("best epoch", lambda run: str(_result(run, "best_epoch"))),
        ("valid perplexity, exact", lambda run: _figure(_result(run, "valid", "perplexity"))),
        ("test perplexity, exact", lambda run: _figure(_result(run, "test", "perplexity"))),
        ("test perplexity, teacher-forced", lambda run: _figure(_result(run, "test", "teacher_forced", "perplexity"))),
        ("test bits per character", lambda run: _figure(_result(run, "test", "bits_per_character"))),
        ("test perplexity of the trigrams", lambda run: _figure(_result(run, "trigram_test_perplexity"))),
        ("test perplexity of the bigrams", lambda run: _figure(_result(run, "bigram_test_perplexity"))),
        ("test perplexity of the unigrams", lambda run: _figure(_result(run, "unigram_test_perplexity"))),
    ]
    for label, figure in figures:
        row = [figure(run) for run in runs]
        if any(value not in ("–", "None") for value in row):
            rows.append([label, *row])
    return rows


def _result(run: Run, *path: str) -> Any:
    value: Any = run.manifest.get("results", {})
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _figure(value: Any) -> str:
    return f"{value:,.3f}" if isinstance(value, float | int) else "–"


def _table(rows: list[list[str]]) -> str:
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    heads = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in body
    )
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'


def _beside(parts: list[tuple[str, str]]) -> str:
    alone = len(parts) == 1
    blocks = (
        f"<section>{'' if alone else f'<h3>{html.escape(name)}</h3>'}{content}</section>" for name, content in parts
    )
    return f'<div class="beside">{"".join(blocks)}</div>'


def _samples(records: Records) -> str:
    found = [record for record in records if record.get("sample")]
    if not found:
        return "<p>None was recorded.</p>"
    items = (
        f"<details{' open' if record is found[-1] else ''}><summary>epoch {record['epoch']}, step {record['step']:,}"
        f"</summary><pre>{html.escape(record['sample'])}</pre></details>"
        for record in found
    )
    return "".join(items)


def _recipe(run: Run, runs: Sequence[Run]) -> str:
    """The resolved recipe; what differs among the runs stands out."""
    differing = {name for other in runs for name in run.recipe.differences(other.recipe)}
    lines, section = [], ""
    for line in run.recipe.to_toml().splitlines():
        section = line.strip("[]") if line.startswith("[") else section
        field = f"{section}.{line.partition(' ')[0]}"
        text = html.escape(line)
        lines.append(f"<mark>{text}</mark>" if field in differing else text)
    return f"<pre>{chr(10).join(lines)}</pre>"


def _provenance(run: Run) -> str:
    manifest = run.manifest
    rows = [["", ""], ["started", manifest["started"]], ["seed", str(manifest["seed"])]]
    rows += [[key, str(value)] for key, value in manifest.get("hardware", {}).items()]
    rows += [[key, str(value)] for key, value in manifest["versions"].items()]
    for split, info in manifest["corpus"]["splits"].items():
        rows.append([split, f"{info['tokens']:,} tokens, SHA-256 {info['sha256']}"])
    rows += [[name, f"SHA-256 {sha256}"] for name, sha256 in manifest["files"].items()]
    return _table(rows)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.5rem; }} h3 {{ font-size: 1rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top; border-bottom: 1px solid #8884; }}
th {{ font-weight: 500; }} td {{ overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; }}
.beside {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem; }}
.beside > section {{ min-width: 0; }}
figure {{ margin: 0; }} figcaption {{ font-weight: 500; margin-bottom: .3rem; }}
svg {{ width: 100%; height: auto; }}
svg text {{ font-family: system-ui, sans-serif !important; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #8881; padding: .8rem; border-radius: .4rem; }}
summary {{ cursor: pointer; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
