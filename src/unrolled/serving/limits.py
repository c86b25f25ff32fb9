"""What one request, and all sessions together, may take; and how a request is refused."""

from dataclasses import dataclass

from unrolled.errors import UnrolledError


class Refused(UnrolledError):
    """A request that is not answered, with the status that says why."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


@dataclass(frozen=True)
class Limits:
    """What one request, and all sessions together, may take."""

    body_bytes: int = 4 << 20
    """Of a request."""
    tokens: int = 200_000
    """Read or drawn by one request, all its texts together; and the most words that are named in an answer."""
    samples: int = 64
    """Texts drawn by one request."""
    seconds: float = 60.0
    """Until a request is given up."""
    requests: int = 256
    """Answered at the same time."""
    sessions: int = 1_000
    session_bytes: int = 256 << 20
    """Of all of them."""
    idle_s: float = 900.0
    """After which an unused session ends."""
