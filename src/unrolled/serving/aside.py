"""Work that would stop the event loop, and so all other requests, done beside it."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from unrolled.data.tokens import Tokenizer

T = TypeVar("T")
_LARGE = 20_000
"""Characters or figures; what has more is not worked through on the event loop."""


async def aside(size: int, function: Callable[..., T], *arguments: Any, encodes: Tokenizer | None = None) -> T:
    """What a function returns, from a thread of its own where there is much to do, or where it encodes by a tokenizer
    that another thread has, and would wait for it."""
    elsewhere = size >= _LARGE or (encodes is not None and encodes.busy)
    return await asyncio.to_thread(function, *arguments) if elsewhere else function(*arguments)


def in_thread(function: Callable[..., T], *arguments: Any) -> "Future[T]":
    """What a function will return, from a thread that nobody waits for when the server ends."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # one who no longer waits for it cannot cancel it for others

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
