"""A server in this process, and a real one in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from starlette.testclient import TestClient

import unrolled
from unrolled.serving.app import make_app


@contextmanager
def server(*arguments: object, port: int = 0, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`unrolled serve` with these arguments, and its address; it has ended when this ends."""
    command = [sys.executable, "-m", "unrolled", "serve", *map(str, arguments), "--port", str(port), "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            assert " at http://" in line, line + process.stderr.read()
            yield process, line.split(" at ")[1].strip()
        finally:
            process.terminate()


@pytest.fixture(scope="session")
def client(toy_run: unrolled.Run, character_run: unrolled.Run) -> Iterator[TestClient]:
    """Two models behind the routes, without a socket."""
    with TestClient(make_app({"toy": toy_run, "characters": character_run})) as client:
        yield client


@pytest.fixture(scope="session")
def address(toy_run: unrolled.Run, character_run: unrolled.Run) -> Iterator[str]:
    """`unrolled serve` of both."""
    with server(toy_run.path, character_run.path) as (_, address):
        yield address
