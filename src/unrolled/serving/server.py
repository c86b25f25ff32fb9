"""`unrolled serve`: the routes behind a socket."""

import signal
import socket
from collections.abc import Callable

import uvicorn

from unrolled.errors import UnrolledError
from unrolled.run import Run
from unrolled.serving.app import make_app
from unrolled.serving.limits import Limits

_LOCAL = ("127.0.0.1", "::1", "localhost")
_GRACE_S = 5


def listen(host: str, port: int) -> socket.socket:
    """A socket that says it is TCP: only for such asyncio sends small answers at once, not some 40 ms later."""
    listening = socket.socket(
        socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP
    )
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1024)
    except OSError:
        listening.close()
        raise
    return listening


def serve(
    runs: dict[str, Run],
    host: str,
    port: int,
    limits: Limits,
    token: str | None,
    threads: int,
    ready: Callable[[str], None],
) -> None:
    """Answers until it is interrupted; then what is under way has some seconds to end.

    Args:
        runs: opened run folders by name.
        host: the address to listen at.
        port: 0 for any that is free.
        limits: of requests.
        token: that requests have to bear; None for none.
        threads: that computing may use.
        ready: called with the server's address once it can be reached.

    Raises:
        UnrolledError: it cannot listen there.
    """
    for run in runs.values():
        _ = run.model  # is read now, not when the first request waits for it
    try:
        listening = listen(host, port)
    except OSError as error:
        message = f"cannot listen at {host}, port {port}: {error.strerror}; pass another --port or --host"
        raise UnrolledError(message) from error
    hosts = ("127.0.0.1", "localhost", "[::1]") if host in _LOCAL else ("*",)  # no other site's name leads here
    app = make_app(runs, limits, token, threads, hosts)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_S, server_header=False
    )
    shown = f"[{host}]" if ":" in host else host
    with listening:
        server = uvicorn.Server(config)
        for number in (
            signal.SIGINT,
            signal.SIGTERM,
        ):  # uvicorn takes them later, and gives them back when it has ended
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        ready(f"http://{shown}:{listening.getsockname()[1]}")
        server.run(sockets=[listening])
