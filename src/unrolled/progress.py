"""What `train` shows while it runs, on standard error: a live line on a terminal, plain lines elsewhere."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SILENCE_S = 30.0
"""Where there is no terminal, a line at least this often."""


class _Console(Console):
    """When nobody reads the progress any more, training goes on without it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Display:
    """The one progress callable of the command.

    Args:
        quiet: show nothing.
        on_epoch: called at the end of every epoch as well, for `--json`.
    """

    def __init__(self, quiet: bool = False, on_epoch: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.quiet = quiet
        self.on_epoch = on_epoch
        self.console = _Console(file=sys.stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.moves = sys.stderr.isatty() and self.console.is_terminal and not self.console.is_dumb_terminal
        self.live = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
            disable=quiet or not self.moves,
            redirect_stdout=False,  # where --json answers
            refresh_per_second=5,
        )
        self.task: TaskID | None = None
        self.said_at = 0.0

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "epoch" and self.on_epoch:
            self.on_epoch(event)
        if self.quiet:
            return
        if kind == "note":
            self._say(event["text"])
        elif kind == "step":
            self._step(event)
        else:
            self._epoch(event)

    def _step(self, event: dict[str, Any]) -> None:
        if event["step"] == 1:
            nats, perplexity = event["nll_nats_per_token"], event["train_perplexity"]
            self._say(f"before training: {nats:.4f} nats a token, perplexity {perplexity:,.0f}")
        if "valid_perplexity" in event:
            self._say(f"step {event['step']:,}  valid {event['valid_perplexity']:,.2f}" + "  *" * event["best"])
        if "sample" in event:
            self._sample(event)
        if self.moves:
            figures = (  # no wider than 80 columns with the bar
                f"perplexity {event['train_perplexity']:.4g} {event['tokens_per_second']:,.0f}/s "
                f"rate {event['learning_rate']:.2g} gradient {event['grad_norm']:.3g}"
            )
            if self.task is None or self.live.tasks[0].total != event["windows"] or event["window"] == 1:
                for task in self.live.task_ids:
                    self.live.remove_task(task)
                self.task = self.live.add_task("", total=event["windows"], epoch="", figures="")
            self.live.update(self.task, completed=event["window"], epoch=event["epoch"], figures=figures)
        elif event["window"] % max(1, event["windows"] // 10) == 0 or time.monotonic() - self.said_at > _SILENCE_S:
            done = event["window"] / event["windows"]
            left = (1 - done) * event["tokens_an_epoch"] / max(event["tokens_per_second"], 1e-9)
            shown = f"  {left:,.0f} s left of it" if done < 1 else ""
            self._say(
                f"epoch {event['epoch']:3d}  {done:4.0%}  perplexity {event['train_perplexity']:9,.2f}  "
                f"{event['tokens_per_second']:8,.0f} tokens/s  rate {event['learning_rate']:.4g}  "
                f"gradient {event['grad_norm']:.3g}{shown}"
            )

    def _epoch(self, event: dict[str, Any]) -> None:
        self._say(
            f"epoch {event['epoch']:2d}  train {event['train_perplexity']:6,.2f}  "
            f"valid {event['valid_perplexity']:6,.2f} ({event['valid_protocol']}) rate {event['learning_rate']:.2g} "
            f"{event['tokens_per_second']:,.0f}/s {event['elapsed_s']:,.0f} s" + (" *" if event["best"] else "")
        )
        if event.get("show_sample") and "sample" in event:
            self._sample(event)

    def _sample(self, event: dict[str, Any]) -> None:
        self._say(f"sample after step {event['step']:,}: {event['sample']}")

    def _say(self, text: str) -> None:
        self.said_at = time.monotonic()
        self.console.print(text)


class Notebook:
    """Progress in a notebook: the epochs so far and their curve, in place. `unrolled.train(…, progress=Notebook())`."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []
        self.step: dict[str, Any] = {}
        self._handle: Any = None
        self._shown_at = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        """Takes an event of the training."""
        if event["event"] == "epoch":
            self.epochs.append(event)
        elif event["event"] == "step":
            self.step = event
        if event["event"] == "epoch" or time.monotonic() - self._shown_at > 0.5:
            self._show()

    def _show(self) -> None:
        from IPython.display import display

        self._shown_at = time.monotonic()
        if self._handle is None:
            self._handle = display(self, display_id=True)
        else:
            self._handle.update(self)

    def _repr_html_(self) -> str:
        step, rows = self.step, ""
        if step:
            rows = (
                f"<p>epoch {step['epoch']}, {step['window'] / step['windows']:.0%}: perplexity "
                f"{step['train_perplexity']:,.2f}, {step['tokens_per_second']:,.0f} tokens/s</p>"
            )
        cells = "".join(
            f"<tr><td>{epoch['epoch']}</td><td>{epoch['train_perplexity']:,.2f}</td>"
            f"<td>{epoch['valid_perplexity']:,.2f}{' *' * epoch['best']}</td><td>{epoch['elapsed_s']:,.0f} s</td></tr>"
            for epoch in self.epochs
        )
        head = "<tr><th>epoch</th><th>train</th><th>valid</th><th>time</th></tr>"
        return f"<div>{rows}<table>{head}{cells}</table>{self._curve()}</div>"

    def _curve(self) -> str:
        """Perplexities by epoch, on a scale of logarithms."""
        series = [[math.log(epoch[f"{split}_perplexity"]) for epoch in self.epochs] for split in ("train", "valid")]
        values = [value for line in series for value in line if math.isfinite(value)]
        if len(self.epochs) < 2 or not values:
            return ""
        low, span = min(values), max(max(values) - min(values), 1e-9)
        lines = ""
        for line, colour in zip(series, ("#4a86c8", "#d0702a"), strict=True):
            points = (
                f"{10 + 380 * place / (len(line) - 1):.1f},{130 - 120 * (value - low) / span:.1f}"
                for place, value in enumerate(line)
                if math.isfinite(value)
            )
            lines += f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{" ".join(points)}"/>'
        return (
            f'<svg width="400" height="140" role="img" aria-label="perplexity by epoch">{lines}</svg>'
            '<p><span style="color:#4a86c8">train</span>, <span style="color:#d0702a">valid</span></p>'
        )
