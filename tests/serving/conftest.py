"""A server in this process, and a real one in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

import unrolled
from unrolled.serving.app import make_app

COMMAND = [sys.executable, "-m", "unrolled", "serve"]


def start(*arguments: object, **environment: str) -> tuple[subprocess.Popen[str], str]:
    """`unrolled serve` with these arguments at a free port, and its address."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments), "--port", "0", "--threads", "1"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert " at http://" in line, line + process.stderr.read()
    return process, line.split(" at ")[1].strip()


@pytest.fixture(scope="session")
def client(toy_run: unrolled.Run, character_run: unrolled.Run) -> Iterator[TestClient]:
    """Two models behind the routes, without a socket."""
    with TestClient(make_app({"toy": toy_run, "characters": character_run})) as client:
        yield client


@pytest.fixture(scope="session")
def address(toy_run: unrolled.Run, character_run: unrolled.Run) -> Iterator[str]:
    """`unrolled serve` of both."""
    process, address = start(toy_run.path, character_run.path)
    with process:
        yield address
        process.terminate()
