"""Makes what in docs/ comes from code and records: commands.md, windows.svg, results/*.svg. Run by `make docs`.

python docs/make.py [FOLDER]             with --tour the notebook is run anew and tour.md made from it
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from unrolled.cli import app
from unrolled.data.batches import Windows
from unrolled.metrics import read_metrics
from unrolled.pictures import COLOURS, perplexity_chart, write_picture

DOCS = Path(__file__).parent
WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "lay", "by", "the", "warm", "door"]


def main(into: Path) -> None:
    (into / "commands.md").write_text(commands(), encoding="utf-8")
    (into / "windows.svg").write_text(windows_drawing(), encoding="utf-8")
    pages: dict[str, dict[str, list[dict[str, Any]]]] = {}  # a picture for each page; some share one
    for metrics in sorted((DOCS / "results").glob("*.metrics.jsonl")):
        name = metrics.name.removesuffix(".metrics.jsonl")
        page = next((one for one in ("text8", "ptb-medium") if name.startswith(one)), name)
        pages.setdefault(page, {})[name] = read_metrics(metrics)
    for page, runs in pages.items():
        write_picture(perplexity_chart(runs), into / "results" / f"{page}.svg")
    for name, drawn in (("speed", speed_chart), ("growth", growth_chart)):
        if (record := DOCS / "results" / f"{name}.jsonl").exists():
            lines = [json.loads(line) for line in record.read_text().splitlines()]
            lines = [line for line in lines if "machine" not in line]  # which says where it was measured
            write_picture(drawn(lines), into / "results" / f"{name}.svg")


def tour(path: Path) -> str:
    """The notebook run from top to bottom, its outputs kept in it, as a page."""
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(DOCS)}}).execute()
    parts = ["<!-- made by docs/make.py from docs/tour.ipynb, which see for running it -->"]
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":  # warnings tell of this machine, not of the tour
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        parts.append(cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```")
        printed = "".join(output.get("text", "") for output in cell.get("outputs", []))
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    nbformat.write(notebook, path)
    return "\n\n".join(parts) + "\n"


def commands() -> str:
    """The help of every command, as Markdown."""
    text = app.generate_docs(output_format="markdown", heading_level=1)
    return "<!-- made by docs/make.py from src/unrolled/commands -->\n\n" + text.rstrip() + "\n"


def speed_chart(records: list[dict[str, Any]]) -> Figure:
    """How many times as fast as the baseline each subject trains, by recipe."""
    trained = [record for record in records if record["task"] == "train"]
    recipes = list(dict.fromkeys(record["recipe"] for record in trained))
    figure = Figure(figsize=(8, 1.2 + 0.22 * len(trained)), layout="constrained")
    heights = [sum(record["recipe"] == recipe for record in trained) for recipe in recipes]
    axes = figure.subplots(len(recipes), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axis, recipe in zip(axes, recipes, strict=True):
        rows = sorted((r for r in trained if r["recipe"] == recipe), key=lambda r: r["ratio_to_baseline"])
        ratios = [row["ratio_to_baseline"] for row in rows]
        colours = [COLOURS[0] if row["subject"].startswith("unrolled") else "#bbbbbb" for row in rows]
        axis.barh([row["subject"] for row in rows], ratios, color=colours)
        for number, row in enumerate(rows):
            text = f"{row['ratio_to_baseline']:.2f}   {row['median']:,.0f} tokens/s"
            axis.annotate(text, (row["ratio_to_baseline"], number), (4, 0), textcoords="offset points", va="center")
        axis.set_title(recipe, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, 1.35 * max(ratios))
    axes[-1].set_xlabel("times the speed of torch f32")
    return figure


def growth_chart(records: list[dict[str, Any]]) -> Figure:
    """Speed above, memory below, against what grows."""
    kinds = list(dict.fromkeys(record["grows"] for record in records))
    subjects = list(dict.fromkeys(record["subject"] for record in records))
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(2, len(kinds), squeeze=False)
    for column, kind in enumerate(kinds):
        for row, (field, label) in enumerate((("tokens_per_second", "tokens/s"), ("peak_memory_mib", "MiB"))):
            axis = axes[row, column]
            for number, subject in enumerate(subjects):
                points = [(r["size"], r[field]) for r in records if (r["grows"], r["subject"]) == (kind, subject)]
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=COLOURS[number], label=subject)
            if kind == "threads":
                axis.set_xticks([1, 2])
            else:
                axis.set_xscale("log")
            axis.set_ylim(bottom=0)
            axis.yaxis.set_major_formatter("{x:,.6g}")
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlabel(kind.replace("_", " ") if row else "")
            axis.set_ylabel(label if not column else "")
    axes[0, 0].legend(frameon=False)
    return figure


def windows_drawing() -> str:
    """How text becomes ids, streams and windows: the windows are those that `Windows` really cuts."""
    ids = np.array([sorted(set(WORDS)).index(word) for word in WORDS])
    windows = list(Windows(np.arange(14), batch_size=2, num_steps=3))
    cell, left = 58, 110
    parts = []

    def text(x: float, y: float, content: str, size: int = 13, anchor: str = "middle", style: str = "") -> None:
        parts.append(f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" {style}>{content}</text>')

    def box(x: float, y: float, colour: str, opacity: float) -> None:
        parts.append(
            f'<rect x="{x + 2:g}" y="{y - 18:g}" width="{cell - 4}" height="26" rx="5" fill="{colour}" '
            f'fill-opacity="{opacity}" stroke="{colour}"/>'
        )

    muted = 'fill="#777"'
    text(left - 14, 40, "text", anchor="end", style=muted)
    text(left - 14, 76, "ids", anchor="end", style=muted)
    for n, word in enumerate(WORDS):
        x = left + n * cell + cell / 2
        text(x, 40, word)
        box(left + n * cell, 76, COLOURS[n // 7], 0.15)
        text(x, 76, str(ids[n]))
    text(left, 118, "cut into B = 2 streams side by side; a window is T = 3 steps of both", 13, "start", muted)
    for k, (inputs, targets) in enumerate(windows):
        shift = left + k * 3 * cell + k * 76
        text(shift + 1.5 * cell, 152, f"window {k}: inputs (T, B)", style='font-weight="600"')
        text(shift + 1.5 * cell, 262, "targets (T, B), one step on", style='font-weight="600"')
        for rows, top, opacity in ((inputs, 182, 0.15), (targets, 292, 0.4)):
            for stream in range(2):
                for step in range(3):
                    position = int(rows[step, stream])
                    box(shift + step * cell, top + stream * 32, COLOURS[stream], opacity)
                    text(shift + step * cell + cell / 2, top + stream * 32, WORDS[position])
        if k:
            for stream in range(2):
                y = 178 + stream * 32
                parts.append(f'<path d="M{shift - 70} {y}H{shift - 8}" stroke="#555" marker-end="url(#arrow)"/>')
            text(shift - 38, 166, "state", 12, style=muted)
    for stream in range(2):
        text(left - 14, 182 + stream * 32, f"stream {stream}", anchor="end", style=f'fill="{COLOURS[stream]}"')
        text(left - 14, 292 + stream * 32, f"stream {stream}", anchor="end", style=f'fill="{COLOURS[stream]}"')
    x = left + 6 * cell + 76 + 24
    lines = (
        "The state starts at zero with the epoch",
        "and is carried from window to window;",
        "gradients stop at a window's first step.",
        "What fills no window is dropped:",
        f"here “{WORDS[6]}” and “{WORDS[13]}” are targets only.",
    )
    for n, line in enumerate(lines):
        text(x, 182 + 22 * n, line, 13, "start", 'fill="#444"')
    body = "\n".join(parts)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 950 350" font-family="system-ui, sans-serif" '
        'fill="#222">\n<title>How text becomes streams and windows</title>\n'
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>\n'
        f'<rect width="950" height="350" fill="#fff"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:] if argument != "--tour"]
    main(folders[0] if folders else DOCS)
    if "--tour" in sys.argv:
        (DOCS / "tour.md").write_text(tour(DOCS / "tour.ipynb"), encoding="utf-8")
