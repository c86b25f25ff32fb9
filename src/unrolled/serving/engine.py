"""One thread that does all the computing, so that requests share it and none can stop another.

    requests ──► short texts that wait together ──► one Reading ─┐
             ──► a long text ──────────────────────► a Reading ──┼─► a window of each in turn ──► answers
             ──► texts being drawn ─────────────────► one Stream ┘   a token of each in turn  ──► pieces

The event loop only takes requests and writes answers; it hands work over by `read`, `draw` and `call`.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, final

import numpy as np
import torch
from torch import Tensor

from unrolled.inference.generate import Drawing
from unrolled.inference.reading import Likeliest, Reading, Unread
from unrolled.nn.stream import Stream
from unrolled.nn.unroll import LayerStates, join, pick
from unrolled.run import Run

_TEXTS_AT_ONCE = 64
_SHORT = 256
"""Tokens; a longer text is read by itself, so that no short one waits for its end."""

T = TypeVar("T")


class Read(NamedTuple):
    """What reading a text gave: nats (S,) of its targets, the likeliest in their places, log-probabilities (V,) after
    it, its state (B = 1)."""

    nats: np.ndarray
    likeliest: Likeliest
    log_probs: Tensor | None
    states: LayerStates


class Drawn(NamedTuple):
    """One token of each text of a drawing: what it adds, the log-probabilities (B, V) that it was drawn from, how many
    tokens the text has now, and whether it has come to a stop."""

    pieces: tuple[str, ...]
    ids: list[int]
    log_probs: Tensor | None
    tokens: list[int]
    stopped: list[bool]


@dataclass
class _Texts:
    """A request to read."""

    run: Run
    texts: Sequence[Unread]
    states: LayerStates | None
    future: "Future[list[Read]]" = field(default_factory=Future)


@dataclass
class _Draw:
    """A drawing under way."""

    run: Run
    drawing: Drawing
    log_probs: Tensor | None
    states: LayerStates
    put: Callable[[Drawn | BaseException | None], None]
    stopped: bool = False

    @property
    def texts(self) -> int:
        return len(self.states[0][0])


@dataclass
class _Call:
    """Anything else."""

    function: Callable[[], Any]
    future: "Future[Any]" = field(default_factory=Future)


@final
class Engine:
    """Computes for many at once, in a thread of its own.

    Args:
        threads: that PyTorch may use within it.
    """

    def __init__(self, threads: int = 1) -> None:
        self._jobs: queue.SimpleQueue[_Texts | _Draw | _Call | None] = queue.SimpleQueue()
        self._readings: list[Iterator[None]] = []
        self._lanes: dict[Run, _Lane] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._work, args=(threads,), name="unrolled-engine", daemon=True)
        self._thread.start()

    async def read(self, run: Run, texts: Sequence[Unread], states: LayerStates | None = None) -> list[Read]:
        """Reads texts from states of all of them, None for zero states, together with what else is asked now."""
        job = _Texts(run, texts, states)
        return await self._done(job, job.future)

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """The result of a function, which meanwhile stops all else: it had better be short."""
        job = _Call(lambda: function(*arguments))
        return await self._done(job, job.future)

    async def draw(
        self, run: Run, drawing: Drawing, log_probs: Tensor | None, states: LayerStates
    ) -> AsyncIterator[Drawn]:
        """Draws from the log-probabilities (B, V) and states (B) after the prompt, a token of each text at a time.

        When whoever listens goes away, so does the drawing.
        """
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Drawn | BaseException | None]()

        def put(piece: Drawn | BaseException | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        job = _Draw(run, drawing, log_probs, states, put)
        self._submit(job)
        try:
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            job.stopped = True

    def close(self) -> None:
        """Ends the thread; what is under way is given up."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join()

    async def _done(self, job: "_Texts | _Call", future: "Future[T]") -> T:
        self._submit(job)
        return await asyncio.wrap_future(future)

    def _submit(self, job: "_Texts | _Draw | _Call") -> None:
        if self._closed:
            raise RuntimeError("the engine is closed")
        self._jobs.put(job)

    # -------------------------------------------------------------------------------------------- in the thread

    def _work(self, threads: int) -> None:
        torch.set_num_threads(threads)
        while not self._closed:
            self._take()
            for reading in list(self._readings):
                if next(reading, reading) is reading:
                    self._readings.remove(reading)
            for lane in self._lanes.values():
                lane.step()
        for lane in self._lanes.values():
            lane.fail(RuntimeError("the server stops"))

    def _take(self) -> None:
        """All jobs that wait; where there is nothing else to do, waits for one."""
        busy = bool(self._readings) or any(lane.draws for lane in self._lanes.values())
        jobs = [] if busy else [self._jobs.get()]
        while not self._jobs.empty():
            jobs.append(self._jobs.get())
        together: dict[Run, list[_Texts]] = {}
        for job in jobs:
            if isinstance(job, _Texts) and max((len(text.ids) for text in job.texts), default=0) <= _SHORT:
                together.setdefault(job.run, []).append(job)
            elif isinstance(job, _Texts):
                self._readings.append(_read([job]))
            elif isinstance(job, _Draw):
                lane = self._lanes.get(job.run) or self._lanes.setdefault(job.run, _Lane(job.run))
                lane.draws.append(job)
            elif isinstance(job, _Call) and job.future.set_running_or_notify_cancel():
                _settle(job.future, job.function)
        self._readings += map(_read, together.values())


def _drawn(drawing: Drawing, log_probs: Tensor | None) -> Drawn:
    pieces = drawing.draw(log_probs)
    return Drawn(pieces, drawing.ids, log_probs, drawing.tokens, [writer.done for writer in drawing.writers])


def _settle(future: "Future[T]", function: Callable[[], T]) -> None:
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)


def _read(jobs: list[_Texts]) -> Iterator[None]:
    """Reads the texts of requests to one model, those of like length side by side; yields after each window."""
    run, found = jobs[0].run, [dict[int, Read]() for _ in jobs]
    try:
        places = [(job, number) for job, request in enumerate(jobs) for number in range(len(request.texts))]
        places.sort(key=lambda place: len(jobs[place[0]].texts[place[1]].ids))
        for first in range(0, len(places), _TEXTS_AT_ONCE):
            chosen = places[first : first + _TEXTS_AT_ONCE]
            texts = [jobs[job].texts[number] for job, number in chosen]
            with run.rounded():
                reading = Reading(run.model, texts, join([_state(jobs[job], number) for job, number in chosen]))
            going = True
            while going:
                with run.rounded():
                    going = reading.advance()
                yield
                if all(job.future.cancelled() for job in jobs):
                    return
            for row, (job, number) in enumerate(chosen):
                log_probs = reading.log_probs[row].clone() if texts[row].follows else None
                found[job][number] = Read(
                    reading.nats[row], reading.likeliest[row], log_probs, pick(reading.states, [row])
                )
        for job, results in zip(jobs, found, strict=True):
            if job.future.set_running_or_notify_cancel():
                job.future.set_result([results[number] for number in range(len(job.texts))])
    except Exception as error:
        for job in jobs:
            if not job.future.done() and job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)


def _state(job: _Texts, number: int) -> LayerStates:
    return job.run.model.initial_state(1) if job.states is None else pick(job.states, [number])


@final
class _Lane:
    """All that is being drawn from one model, as one stream."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.draws: list[_Draw] = []
        self._stream: Stream | None = None
        self._rows: list[Tensor | None] = []

    def step(self) -> None:
        """One token of every text."""
        if not self.draws:
            return
        try:
            with self.run.rounded(), torch.inference_mode():
                self._step()
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Gives up what is under way."""
        for draw in self.draws:
            draw.put(error)
        self.draws, self._rows, self._stream = [], [], None

    def _step(self) -> None:
        stream = self._stream = self._stream or Stream(self.run.model, self.run.model.initial_state(0))
        for draw in self.draws[len(self._rows) :]:
            stream.add(draw.states)
            self._rows.append(draw.log_probs)
        going, kept, ids, first = list[_Draw](), list[int](), list[int](), 0
        for draw, rows in zip(self.draws, self._rows, strict=True):
            last = first + draw.texts
            if not draw.stopped and not draw.drawing.done:
                draw.put(_drawn(draw.drawing, rows))
                going.append(draw)
                kept += range(first, last)
                ids += draw.drawing.ids
            else:
                draw.put(None)
            first = last
        self.draws, self._rows = going, []
        if len(kept) < first:
            stream.pick(torch.tensor(kept, dtype=torch.int64, device=self.run.device))
        if ids:
            rows = stream.read(torch.tensor(ids, device=self.run.device)).cpu()
            self._rows = list(rows.split([draw.texts for draw in going]))
