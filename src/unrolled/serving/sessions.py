"""Recurrent states kept between requests, so that a text that grows costs one step for each further token."""

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import numpy as np
from torch import Tensor

from unrolled.nn.unroll import LayerStates
from unrolled.run import Run


@dataclass(frozen=True)
class Place:
    """Where a reader stands: the state (B = 1) after so many tokens, the last of them, log-probabilities (V,) of the
    next."""

    states: LayerStates
    log_probs: Tensor
    tokens: int
    last_ids: np.ndarray

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        tensors = [self.log_probs, *(part for state in self.states for part in state)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass
class Session:
    """A text being read by one model; `lock` is held while more of it is."""

    id: str
    model: str
    run: Run
    place: Place
    used: float
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@final
class Sessions:
    """All sessions, of a bounded number and size; the one unused for longest gives way.

    Args:
        most: sessions.
        most_bytes: of all of them.
        idle_s: seconds after which an unused one ends.
        now: the time in seconds.
    """

    def __init__(self, most: int, most_bytes: int, idle_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self.most, self.most_bytes, self.idle_s, self.now = most, most_bytes, idle_s, now
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        self._expire()
        return len(self._sessions)

    def begin(self, model: str, run: Run, place: Place) -> Session:
        """A new session."""
        session = Session(secrets.token_urlsafe(16), model, run, place, self.now())
        self._sessions[session.id] = session
        self.bytes += place.bytes
        self._expire()
        while len(self) > 1 and (len(self) > self.most or self.bytes > self.most_bytes):
            self._end(next(iter(self._sessions)))
        return session

    def find(self, id: str) -> Session | None:
        """The session, which counts as used now; None where there is none, or no longer."""
        self._expire()
        if session := self._sessions.get(id):
            session.used = self.now()
            self._sessions.move_to_end(id)
        return session

    def go_on(self, session: Session, place: Place) -> None:
        """The session stands there now."""
        if session.id in self._sessions:
            self.bytes += place.bytes - session.place.bytes
            self._sessions.move_to_end(session.id)
        session.place, session.used = place, self.now()

    def fork(self, session: Session) -> Session:
        """A second session at the same place; the state is shared until one of them goes on."""
        return self.begin(session.model, session.run, session.place)

    def end(self, id: str) -> bool:
        """Forgets a session; whether there was one."""
        return self.find(id) is not None and self._end(id)

    def _end(self, id: str) -> bool:
        self.bytes -= self._sessions.pop(id).place.bytes
        return True

    def _expire(self) -> None:
        while self._sessions and self.now() - next(iter(self._sessions.values())).used > self.idle_s:
            self._end(next(iter(self._sessions)))
