"""Answers as a notebook shows them: small pieces of HTML, in light and in dark."""

import html
import math
from collections.abc import Sequence

from unrolled.data.tokens import shown

_HOTTEST_BITS = 16.0


def prediction_html(prefix: str, words: Sequence[tuple[str, float]]) -> str:
    """Tokens with bars as long as they are probable."""
    rows = "".join(
        f'<tr><td style="text-align:left">{html.escape(shown(word))}</td><td>{_percent(probability)}</td>'
        f'<td style="text-align:left;width:16em"><div style="background:#4a86c8;height:.8em;'
        f'width:{100 * probability:.1f}%"></div></td></tr>'
        for word, probability in words
    )
    return f"<div><p>after “{html.escape(prefix)}”</p><table>{rows}</table></div>"


def score_html(per_token: Sequence[tuple[str, float]], unknown: int, perplexity: float | None) -> str:
    """A heat map: the more surprising a token, the warmer; its figures under the pointer."""
    spans = []
    for token, log_prob in per_token:
        bits = -log_prob / math.log(2)
        warmth = 0.85 * min(bits, _HOTTEST_BITS) / _HOTTEST_BITS
        title = f"{bits:.1f} bits, probability {math.exp(log_prob):.2g}"
        end = "<br>" if token in ("<eos>", "\n") else ""
        spans.append(
            f'<span title="{html.escape(title)}" style="background:rgba(214,74,22,{warmth:.2f});border-radius:3px;'
            f'padding:0 2px">{html.escape(shown(token))}</span>{end}'
        )
    bits = -sum(log_prob for _, log_prob in per_token) / math.log(2)
    figures = f"{len(per_token)} tokens, {bits:.1f} bits" + (
        "" if perplexity is None else f", perplexity {perplexity:.1f}"
    )
    figures += f", {unknown} unknown" * bool(unknown)
    return f'<div style="line-height:1.8">{" ".join(spans)}<p>{figures}</p></div>'


def table_html(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Names and what they stand for."""
    left = 'style="text-align:left"'
    lines = "".join(
        f"<tr><th {left}>{html.escape(name)}</th><td {left}>{html.escape(value)}</td></tr>" for name, value in rows
    )
    return f"<div><p><b>{html.escape(title)}</b></p><table>{lines}</table></div>"


def _percent(probability: float) -> str:
    return f"{100 * probability:.1f} %" if probability >= 0.0005 else "&lt; 0.1 %"
