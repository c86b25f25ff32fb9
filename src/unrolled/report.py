"""A run, or several, as one self-contained HTML page."""

import html
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unrolled.errors import UnrolledError
from unrolled.files import write_whole
from unrolled.inference.embeddings import map_tokens
from unrolled.metrics import read_metrics
from unrolled.pictures import Records, chart, map_figure, perplexity_chart, svg
from unrolled.run import Run


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
            _beside([(name, _map(run, words, len(runs))) for name, run in zip(names, runs, strict=True)]),
        ]
    sections += ["<h2>Samples</h2>", _beside([(name, _samples(metrics[name])) for name in names])]
    sections += [
        "<h2>Recipes</h2>",
        _beside([(name, _recipe(run, runs)) for name, run in zip(names, runs, strict=True)]),
    ]
    sections += ["<h2>Provenance</h2>", _beside([(n, _provenance(run)) for n, run in zip(names, runs, strict=True)])]
    title = "Unrolled: " + ", ".join(names)
    page = _PAGE.format(title=html.escape(title), body="\n".join(sections))
    write_whole(
        Path(os.path.realpath(path)), page.encode(errors="replace")
    )  # a text that is no Unicode may stand in a record


def _curves(metrics: dict[str, Records]) -> list[str]:
    charts = {
        "Perplexity": perplexity_chart(metrics),
        "Learning rate": chart(metrics, "learning_rate"),
        "Gradient norm before clipping": chart(metrics, "grad_norm"),
        "Tokens per second": chart(metrics, "tokens_per_second"),
    }
    figures = [f"<figure><figcaption>{title}</figcaption>{svg(figure)}</figure>" for title, figure in charts.items()]
    return ["<h2>Curves</h2>", f'<div class="charts">{"".join(figures)}</div>']


def _map(run: Run, words: int, side_by_side: int) -> str:
    try:
        tokens, places = map_tokens(run.model, run.tokenizer, words)
    except UnrolledError as error:
        return f"<p>{html.escape(str(error))}</p>"
    figure, _ = map_figure(tokens, places, widest=11.0 if side_by_side == 1 else 5.5)
    return f'<div style="max-width: {figure.get_figwidth():.1f}in">{svg(figure)}</div>'


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
            lambda run: ": ".join(filter(None, [run.manifest["corpus"]["name"], run.manifest["corpus"]["note"]])),
        ),
        ("epochs", lambda run: str(run.manifest.get("epochs", "–"))),
        ("training", lambda run: f"{run.manifest.get('training_s', 0):,.0f} s"),
        ("best epoch", lambda run: str(_result(run, "best_epoch") or "–")),
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
        if any(value != "–" for value in row):
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
    lines, section, field = [], "", ""
    for line in run.recipe.to_toml().splitlines():
        section = line.strip("[]") if line.startswith("[") else section
        if not line.startswith((" ", "]")):  # else the field's list goes on
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
