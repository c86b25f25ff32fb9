"""Shared by all tests: a cache of their own, one thread a worker, a small trained model, the real data where it is."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import unrolled
from unrolled.data.text import find
from unrolled.files import cache_folder

settings.register_profile("tests", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("tests")
torch.set_num_threads(1)


QUICK = {"training.learning_rate": 0.01, "model.dropout": 0.0, "model.init_scale": 0.2}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No test reads or writes the user's cache, but for the kernels that are built there."""
    folder = tmp_path_factory.mktemp("cache")
    kernels = cache_folder() / "kernels"
    if kernels.is_dir():
        (folder / "kernels").symlink_to(kernels.resolve())
    os.environ["UNROLLED_CACHE"] = str(folder)
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes | str], Path]:
    """Writes a file in the test's folder."""

    def write_file(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> unrolled.Run:
    """A model of `toy`, trained for seconds."""
    small = {"training.max_epochs": 2, "model.embedding_size": 32, "model.hidden_sizes": "64,48"} | QUICK
    return unrolled.train("demo", data="toy", out=tmp_path_factory.mktemp("runs") / "toy", changes=small)


@pytest.fixture(scope="session")
def character_run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> unrolled.Run:
    """A character model of `toy` that knows no `<unk>`, trained for seconds."""
    small = {
        "training.max_epochs": 1,
        "training.batch_size": 64,
        "model.embedding_size": 16,
        "model.hidden_sizes": "64",
        "model.cell": "gru",
        "data.tokens": "character",
        "data.vocab_size": 0,
        "data.min_count": 1,
        "data.unknown": False,
    } | QUICK
    return unrolled.train("demo", data="toy", out=tmp_path_factory.mktemp("runs") / "characters", changes=small)


def _real(name: str) -> None:
    if find(name) is None:
        pytest.skip(f"{name} is not here; UNROLLED_DATA names the folder that holds its archive")


@pytest.fixture
def ptb() -> str:
    """The real PTB, or skip."""
    _real("ptb")
    return "ptb"


@pytest.fixture
def text8() -> str:
    """The real text8 or a prefix of it, or skip."""
    _real("text8")
    return "text8"
