"""The native kernels: compiled for this processor when asked to, kept in the cache, loaded where they are there.

Nothing is compiled by importing this or by making a model: `unrolled kernels build` does it, once for each version of
the sources, of PyTorch and of the processor. Without a compiler, or before that, everything runs on PyTorch alone.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from unrolled.errors import UnrolledError
from unrolled.files import cache_folder, sha256_of

SOURCES = Path(__file__).parent / "source"
OPTIONS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-w")
_ABANDONED_S = 3600
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Level:
    """A kind of processor: the flags that it shows, the compiler's options for it, whether it multiplies bf16."""

    flags: frozenset[str]
    options: tuple[str, ...]
    multiplies_bf16: bool = False


def _levels() -> dict[str, Level]:
    avx2 = {"avx2", "fma"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    bf16 = avx512 | {"avx512_bf16"}
    amx = bf16 | {"amx_tile", "amx_bf16"}

    def level(flags: set[str], multiplies_bf16: bool = False) -> Level:
        options = tuple("-m" + flag.replace("512_", "512").replace("amx_", "amx-") for flag in sorted(flags))
        return Level(frozenset(flags), options, multiplies_bf16)

    return {
        "amx": level(amx, True),
        "avx512-bf16": level(bf16, True),
        "avx512": level(avx512),
        "avx2": level(avx2),
        "portable": level(set()),
    }


LEVELS = _levels()
"""From the fastest down."""


@cache
def processor_flags() -> frozenset[str]:
    """What the processor says it can do; nothing where there is no /proc/cpuinfo, which leaves the portable level."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())


def levels() -> list[str]:
    """The levels that may be used, the best first: those that this processor can, or `UNROLLED_KERNELS` (one, or off).

    Raises:
        UnrolledError: there is no such level, or the processor cannot do it.
    """
    able = [name for name, level in LEVELS.items() if level.flags <= processor_flags()]
    wanted = os.environ.get("UNROLLED_KERNELS")
    if not wanted or wanted == "off":
        return [] if wanted else able
    if wanted not in able:
        raise UnrolledError(f"UNROLLED_KERNELS is {wanted!r}; here it may be off, " + ", ".join(able))
    return [wanted]


def library_path(level: str) -> Path:
    """Where the library of a level lies, or would: its name says what it was made from."""
    made_from = hashlib.sha256(torch.__version__.encode())
    sources = sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cpp"))
    for part in (*sources, *OPTIONS, *LEVELS[level].options):
        made_from.update(part.read_bytes() if isinstance(part, Path) else part.encode())
    return cache_folder() / "kernels" / f"{platform.machine()}-{level}-{made_from.hexdigest()[:16]}.so"


def compiler() -> list[str] | None:
    """The C++ compiler's command: `CXX`, or the first that is there."""
    if command := os.environ.get("CXX"):
        try:
            if parts := shlex.split(command):
                return parts
        except ValueError as error:
            raise UnrolledError(f"CXX is {command!r}, which is no command: {error}") from error
    return next(([path] for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)


def build(again: bool = False, progress: Callable[[str], None] = lambda text: None) -> tuple[str, Path]:
    """Compiles the kernels for this processor, unless they are there; where its best level fails, those of the next.

    The library is made under another name, tried in a process of its own, and then given its name, so two that build
    at once do each other no harm, and what does not run is never loaded.

    Args:
        again: although they are there.
        progress: told of each level before it is compiled, and of those that failed.

    Returns:
        The level, and its library.

    Raises:
        UnrolledError: they are switched off, there is no compiler, or the build failed; PyTorch's own way remains.
    """
    failures: list[UnrolledError] = []
    for level in levels():
        path = library_path(level)
        if again or not is_whole(path) or opened(path) is None:
            if (command := compiler()) is None:
                raise UnrolledError(
                    "no C++ compiler: install g++ (apt install g++) and run unrolled kernels build; "
                    "until then everything runs on PyTorch alone"
                )
            progress(f"compiling for {level}; it takes a quarter of a minute")
            try:
                _compile(command, level, path)
            except UnrolledError as error:
                if isinstance(error.__cause__, OSError):  # the compiler itself cannot be run
                    raise
                failures.append(error)
                progress(f"{level}: {error}")
                continue
        _loaded.cache_clear()  # whoever asked before it was there asks again
        return level, path
    raise failures[0] if failures else UnrolledError("the kernels are switched off: UNROLLED_KERNELS is off")


def _compile(command: list[str], level: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(".build-*"):  # by a build that was killed
        with suppress(OSError):  # another sweeps too
            if left.stat().st_mtime < time.time() - _ABANDONED_S:
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as folder:
        made = Path(folder) / "kernels.so"
        sources = sorted(map(str, SOURCES.glob("*.cpp")))
        _run([*command, *OPTIONS, *LEVELS[level].options, *sources, "-o", str(made)], "did not compile")
        if not made.exists():
            raise UnrolledError(f"the kernels did not compile: {command[0]} made no library; CXX names the compiler")
        _run([sys.executable, "-c", _CHECK, str(made)], "do not run here")
        with _hash_file(path).open("a", encoding="utf-8") as hashes:  # beside that of another, who builds at once
            hashes.write(f"\n{sha256_of(made)}\n")
        made.replace(path)


def is_whole(path: Path) -> bool:
    """Whether a library is there as it was built."""
    try:
        return sha256_of(path) in _hash_file(path).read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False


def _hash_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


_CHECK = """
import sys
from pathlib import Path
import torch
from unrolled.kernels import build
from unrolled.nn.model import LanguageModel
library = build.opened(Path(sys.argv[1]))
if library is None:
    sys.exit("the library cannot be loaded, or the system does not grant the processor's matrix unit")
build._loaded = lambda: ("tried", library)
model, ids = LanguageModel(300, 20, [40]), torch.arange(90).view(9, 10)
for narrow in (False, True):
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        nll, _, _ = model.nll(ids, ids, model.initial_state(10))
    nll.backward()
    if not all(each.grad.isfinite().all() for each in model.parameters()):
        sys.exit("what they compute is no number")
"""
"""A window's loss and gradients, in a process that may die of it."""


def _run(command: list[str], failure: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UnrolledError(f"the kernels {failure}: {command[0]}: {error.strerror}") from error
    if done.returncode:
        ended = f"status {done.returncode}" if done.returncode > 0 else signal.Signals(-done.returncode).name
        lines = done.stderr.strip().splitlines() or [f"{command[0]} ended with {ended}"]
        said = [line for line in lines if "error" in line or "No space left" in line] or lines[-1:]
        named = "; CXX names the compiler" if os.environ.get("CXX") else ""
        raise UnrolledError(f"the kernels {failure}: {said[0]}{named}; without them all runs on PyTorch alone")


SIGNATURES = {
    "prepare": "",
    "recurrent_forward": "iiiqqqq" + "p" * 11,
    "recurrent_backward": "iiiqqqq" + "p" * 17,
    "decoder_forward": "iiqqq" + "p" * 8,
    "decoder_backward": "iiqqq" + "p" * 11,
    "clip_and_descend": "iipppqqqpppiddp",
    "clip_and_adapt": "ii" + "p" * 7 + "d" * 5 + "p",
    "dropout": "iqqfqpp",
    "layer_size": "iiiqqp",
    "lay_out_layer": "iiiqq" + "p" * 6,
    "lay_out_decoder": "iqqpp",
    "step_of_model": "pqiqppqqpp",
    "likeliest_of_model": "pqippqqpp",
}
_TYPES = {"i": ctypes.c_int, "q": ctypes.c_int64, "p": ctypes.c_void_p, "f": ctypes.c_float, "d": ctypes.c_double}


_off = False


@contextmanager
def switched_off() -> Iterator[None]:
    """Within it everything runs on PyTorch alone."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they are not there or switched off."""
    return None if _off else _loaded()[1]


@cache
def _loaded() -> tuple[str, ctypes.CDLL | None]:
    """The best level that was there when they were first asked for, and its library."""
    for level in levels():
        path = library_path(level)
        if is_whole(path) and (found := opened(path)):
            return level, found
    return "none", None


def opened(path: Path) -> ctypes.CDLL | None:
    """A library, ready to be called; None where the system does not load it, or does not grant it the matrix unit."""
    try:
        found = ctypes.CDLL(str(path))
    except OSError:
        return None
    for name, signature in SIGNATURES.items():
        getattr(found, name).argtypes = [_TYPES[letter] for letter in signature]
    return found if found.prepare() == 0 else None


def processor_multiplies_bf16() -> bool:
    """Whether this processor has an instruction for it that one of the levels takes."""
    return any(level.multiplies_bf16 and level.flags <= processor_flags() for level in LEVELS.values())


def in_use() -> str:
    """The level of the kernels that run here, or none."""
    return "none" if _off else _loaded()[0]


def multiplies_bf16() -> bool:
    """Whether the kernels run here and the processor multiplies bf16 of its own accord."""
    return in_use() != "none" and LEVELS[in_use()].multiplies_bf16
