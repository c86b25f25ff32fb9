"""What stands before every request: who may ask, how many at a time; and what is counted."""

import asyncio
import hmac
import time
from collections.abc import Mapping
from typing import Any, final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unrolled.serving.service import Service

OPEN = ("/", "/page.js", "/page.css", "/healthz", "/openapi.json", "/docs", "/redoc")
"""What needs no token: it tells nothing of the models."""
_METHODS = ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


def problem(
    status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """What went wrong, as every answer other than 2xx says it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    detail = {"message": " ".join(message.split()), "type": kind, "param": param, "code": None}
    return JSONResponse({"error": detail}, status, headers)


@final
class Metrics:
    """Counts for Prometheus."""

    def __init__(self, service: Service) -> None:
        self.registry = registry = CollectorRegistry()
        labels = ("method", "path", "status")
        self.requests = Counter("unrolled_requests", "Requests answered.", labels, registry=registry)
        self.seconds = Histogram(
            "unrolled_request_seconds", "From request to last byte.", ("path",), buckets=_SECONDS, registry=registry
        )
        self.active = Gauge("unrolled_requests_active", "Requests under way.", registry=registry)
        for name, about, value in (
            ("sessions", "Sessions that stand.", lambda: len(service.sessions)),
            ("session_bytes", "Memory of all sessions.", lambda: service.sessions.bytes),
            ("tokens_read", "Tokens read since the start.", lambda: service.engine.tokens_read),
            ("tokens_drawn", "Tokens drawn since the start.", lambda: service.engine.tokens_drawn),
        ):
            Gauge(f"unrolled_{name}", about, registry=registry).set_function(value)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)


@final
class Guard:
    """ASGI middleware.

    Args:
        app: what it stands before.
        metrics: what counts.
        token: that requests have to bear; None for none.
        requests: how many may be under way.
        body_bytes: the most of a request.
        seconds: that a part of an answer may wait to be taken.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, token: str | None, requests: int, body_bytes: int, seconds: float
    ) -> None:
        self.app, self.metrics, self.token = app, metrics, token
        self.requests, self.body_bytes, self.seconds, self.active = requests, body_bytes, seconds, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status, started = time.perf_counter(), 500, False

        async def counted(message: Message) -> None:
            nonlocal status, started
            status, started = message.get("status", status), True
            try:
                async with asyncio.timeout(self.seconds):
                    await send(message)
            except TimeoutError as error:
                raise _NobodyReads from error

        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.body_bytes:
                raise HTTPException(413, f"a request may have {self.body_bytes:,} bytes", {"Connection": "close"})
            return message

        self.active += 1
        self.metrics.active.inc()
        try:
            await (self._refusal(scope["path"], Headers(scope=scope)) or self.app)(scope, bounded, counted)
        except _NobodyReads:
            pass  # the server closes a connection whose answer has no end
        except asyncio.CancelledError:  # the server stops, and the time that it gave is over
            if not started:
                await problem(503, "the server stops")(scope, receive, send)
        finally:
            self.active -= 1
            self.metrics.active.dec()
            path = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self.metrics.requests.labels(method, path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - begun)

    def _refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        if self.token is not None and path not in OPEN and not path.startswith("/static-offline-docs/"):
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
                message = "this server wants its token: Authorization: Bearer …"
                return problem(401, message, headers={"WWW-Authenticate": "Bearer"})
        if self.active > self.requests and path != "/healthz":
            return problem(429, f"{self.requests} requests are under way; try again", headers={"Retry-After": "1"})
        return None


class _NobodyReads(Exception):
    """Whoever asked does not take the answer."""


def describe(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problems of a route, for its description."""
    about = {
        400: "Not JSON",
        401: "Without the token",
        404: "No such model or session",
        408: "It took too long",
        413: "The request is too long",
        422: "A value is wrong or beyond a limit",
        429: "Too many requests",
    }
    return {status: {"description": about[status]} for status in statuses}
