"""One thread that does all the computing, so that requests share it and none can stop another.

    requests ──► small ones that wait together ──► one reading ─┐
             ──► a large one ───────────────────► a reading ────┼─► a window of each in turn ──► answers
             ──► texts being drawn ─────────────► one stream ───┘   a token of each in turn  ──► pieces

The event loop only takes requests and writes answers; it hands work over by `read`, `draw` and `last`.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar, final

import numpy as np
import torch
from torch import Tensor

from unrolled.inference.generate import Drawing
from unrolled.inference.reading import Likeliest, Reading, Unread, alike
from unrolled.nn.stream import Stream
from unrolled.nn.unroll import LayerStates, join, pick
from unrolled.run import Run

_SMALL = 256
"""Tokens of a request, all its texts together; a larger one is read by itself, so that no small one waits for it."""
_AHEAD = 16
"""Tokens that a drawing may be ahead of whoever listens."""
_CLOSING_S = 5.0

T = TypeVar("T")


class Read(NamedTuple):
    """What reading a text gave: nats (S,) of its targets, the likeliest in their places; and where what follows was
    asked for, log-probabilities (V,) after it and its state (B = 1)."""

    nats: np.ndarray
    likeliest: Likeliest
    log_probs: Tensor | None
    states: LayerStates


class Drawn(NamedTuple):
    """One token of each text of a drawing: what it adds, its id, the log-probabilities (B, V) that it was drawn from
    where they were asked for, how many tokens the text has now, and whether it has come to a stop."""

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
class _Steps(Generic[T]):
    """Anything else, in steps; in the precision of a run where there is one."""

    steps: Iterator[T]
    run: Run | None
    future: "Future[T]" = field(default_factory=Future)


@dataclass
class _Draw:
    """A drawing under way; `given` pieces were put, `taken` of them were listened to."""

    run: Run
    drawing: Drawing
    log_probs: Tensor | None
    states: LayerStates
    wants_log_probs: bool
    put: Callable[[Drawn | BaseException | None], None]
    stopped: bool = False
    given: int = 0
    taken: int = 0

    @property
    def waits(self) -> bool:
        return not self.stopped and self.given - self.taken >= _AHEAD


@final
class Engine:
    """Computes for many at once, in a thread of its own.

    Args:
        threads: that PyTorch may use within it.

    Attributes:
        tokens_read: since it began.
        tokens_drawn: since it began.
    """

    def __init__(self, threads: int = 1) -> None:
        self._jobs: queue.SimpleQueue[_Texts | _Draw | _Steps[Any] | None] = queue.SimpleQueue()
        self._rounds: list[Iterator[None]] = []
        self._lanes: dict[Run, _Lane] = {}
        self._closed = False
        self.tokens_read = self.tokens_drawn = 0
        self._thread = threading.Thread(target=self._work, args=(threads,), name="unrolled-engine", daemon=True)
        self._thread.start()

    async def read(self, run: Run, texts: Sequence[Unread], states: LayerStates | None = None) -> list[Read]:
        """Reads texts from states of all of them, None for zero states, together with what else is asked now."""
        job = _Texts(run, texts, states)
        self._submit(job)
        results = await asyncio.wrap_future(job.future)
        self.tokens_read += sum(len(text.ids) for text in texts)
        return results

    async def last(self, steps: Iterator[T], run: Run | None = None) -> T:
        """The last of what an iterator yields, a step of it in each round; in the precision of `run`, if any."""
        job = _Steps(steps, run)
        self._submit(job)
        return await asyncio.wrap_future(job.future)

    async def draw(
        self,
        run: Run,
        drawing: Drawing,
        log_probs: Tensor | None,
        states: LayerStates,
        wants_log_probs: bool = False,
    ) -> AsyncIterator[Drawn]:
        """Draws from the log-probabilities (B, V) and states (B) after the prompt, a token of each text at a time.

        It is never far ahead of whoever listens; when they go away, it ends.
        """
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Drawn | BaseException | None]()

        def put(piece: Drawn | BaseException | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        job = _Draw(run, drawing, log_probs, states, wants_log_probs, put)
        self._submit(job)
        try:
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                self.tokens_drawn += len(piece.ids)
                yield piece
                job.taken += 1
        finally:
            job.stopped = True

    def close(self) -> None:
        """Ends the thread; what is under way is given up."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join(_CLOSING_S)

    def _submit(self, job: "_Texts | _Draw | _Steps[Any]") -> None:
        if self._closed:
            raise RuntimeError("the engine is closed")
        self._jobs.put(job)

    # -------------------------------------------------------------------------------------------- in the thread

    def _work(self, threads: int) -> None:
        torch.set_num_threads(threads)
        while not self._closed:
            self._take()
            for one in list(self._rounds):
                if next(one, one) is one:
                    self._rounds.remove(one)
            for lane in self._lanes.values():
                lane.step()
        for lane in self._lanes.values():
            lane.fail(RuntimeError("the server stops"))

    def _take(self) -> None:
        """All jobs that wait; where there is nothing else to do, waits for one."""
        jobs = list[_Texts | _Draw | _Steps[Any] | None]()
        draws = [draw for lane in self._lanes.values() for draw in lane.draws]
        if not self._rounds and all(draw.waits for draw in draws):
            try:
                jobs.append(self._jobs.get(timeout=0.005 if draws else None))
            except queue.Empty:
                return
        while not self._jobs.empty():
            jobs.append(self._jobs.get())
        together: dict[Run, list[_Texts]] = {}
        for job in jobs:
            if isinstance(job, _Texts) and sum(len(text.ids) for text in job.texts) <= _SMALL:
                together.setdefault(job.run, []).append(job)
            elif isinstance(job, _Texts):
                self._rounds.append(_read([job]))
            elif isinstance(job, _Draw):
                lane = self._lanes.get(job.run) or self._lanes.setdefault(job.run, _Lane(job.run))
                lane.draws.append(job)
            elif isinstance(job, _Steps):
                self._rounds.append(_stepped(job))
        self._rounds += map(_read, together.values())


def _stepped(job: "_Steps[Any]") -> Iterator[None]:
    try:
        found = step = None
        while step is not job:
            found = step
            with job.run.rounded() if job.run else nullcontext():
                step = next(job.steps, job)
            yield
            if job.future.cancelled():
                return
        if job.future.set_running_or_notify_cancel():
            job.future.set_result(found)
    except Exception as error:
        _fail(job.future, error)


def _fail(future: "Future[Any]", error: Exception) -> None:
    if not future.done() and future.set_running_or_notify_cancel():
        future.set_exception(error)


def _read(jobs: list[_Texts]) -> Iterator[None]:
    """Reads the texts of requests to one model, those of like length side by side; yields after each window."""
    run, found = jobs[0].run, [dict[int, Read]() for _ in jobs]
    try:
        places = [(job, number) for job, request in enumerate(jobs) for number in range(len(request.texts))]
        for group in alike([len(jobs[job].texts[number].ids) for job, number in places]):
            chosen = [places[place] for place in group if not jobs[places[place][0]].future.cancelled()]
            if not chosen:
                continue
            texts = [jobs[job].texts[number] for job, number in chosen]
            with run.rounded():
                reading = Reading(run.model, texts, join([_state(jobs[job], number) for job, number in chosen]))
            going = True
            while going:
                with run.rounded():
                    going = reading.advance()
                yield
                if all(jobs[job].future.cancelled() for job, _ in chosen):
                    break
            if going:  # nobody waits for these any more
                continue
            for row, (job, number) in enumerate(chosen):
                follows = texts[row].follows
                log_probs = reading.log_probs[row].clone() if follows else None
                states = pick(reading.states, [row]) if follows else ()
                found[job][number] = Read(reading.nats[row], reading.likeliest[row], log_probs, states)
            _settle(jobs, found)
        _settle(jobs, found)  # those of no texts
    except Exception as error:
        for request in jobs:
            _fail(request.future, error)


def _settle(jobs: list[_Texts], found: list[dict[int, Read]]) -> None:
    """Answers the requests of which all texts have been read."""
    for job, results in zip(jobs, found, strict=True):
        whole = len(results) == len(job.texts)
        if whole and not job.future.done() and job.future.set_running_or_notify_cancel():
            job.future.set_result([results[number] for number in range(len(results))])


def _state(job: _Texts, number: int) -> LayerStates:
    return job.run.model.initial_state(1) if job.states is None else pick(job.states, [number])


@final
class _Lane:
    """All that is being drawn from one model, as one stream."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.draws: list[_Draw] = []
        self._stream: Stream | None = None

    def step(self) -> None:
        """One token of every text that is listened to."""
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
        self.draws = []

    def _step(self) -> None:
        stream = self._stream = self._stream or Stream(self.run.model, self.run.model.initial_state(0))
        going = list[_Draw]()
        for draw in list(self.draws):
            if draw.waits:
                continue
            if not draw.stopped and not draw.drawing.done:
                try:
                    pieces = draw.drawing.draw(draw.log_probs)
                except Exception as error:  # its own, and no other's
                    draw.put(error)
                    self.draws.remove(draw)
                    continue
                shown, drawing = draw.log_probs if draw.wants_log_probs else None, draw.drawing
                stopped = [writer.done for writer in drawing.writers]
                draw.given += 1
                draw.put(Drawn(pieces, drawing.ids, shown, drawing.tokens, stopped))
            if draw.stopped or draw.drawing.done:
                draw.put(None)
                self.draws.remove(draw)
            else:
                going.append(draw)
        if not going:
            return
        stream.states = join([draw.states for draw in going])
        ids = [id for draw in going for id in draw.drawing.ids]
        sizes = [len(draw.drawing.ids) for draw in going]
        rows = stream.read(torch.tensor(ids, device=self.run.device)).cpu()
        parts = [part.split(sizes) for state in stream.states for part in state]
        for number, (draw, log_probs) in enumerate(zip(going, rows.split(sizes), strict=True)):
            each = iter(part[number] for part in parts)
            draw.states = tuple(tuple(next(each) for _ in state) for state in draw.states)
            draw.log_probs = log_probs
