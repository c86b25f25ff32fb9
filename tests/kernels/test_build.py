"""The kernels are built when asked to, whole or not at all, and what cannot be built is said in one line."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from unrolled import UnrolledError
from unrolled.files import sha256_of
from unrolled.kernels import build

ABLE = [name for name, level in build.LEVELS.items() if level.flags <= build.processor_flags()]
BUILT = build.library_path(build.in_use()) if build.library() else None
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNROLLED_CACHE", str(tmp_path))
    monkeypatch.delenv("UNROLLED_KERNELS", raising=False)
    return tmp_path


def test_the_best_level_of_the_processor_is_taken_unless_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNROLLED_KERNELS", raising=False)
    assert build.levels() == ABLE
    for name in ABLE:
        monkeypatch.setenv("UNROLLED_KERNELS", name)
        assert build.levels() == [name]
    monkeypatch.setenv("UNROLLED_KERNELS", "off")
    assert build.levels() == []
    monkeypatch.setenv("UNROLLED_KERNELS", "avx1024")
    with pytest.raises(UnrolledError, match=r"'avx1024'; here it may be off, .*portable"):
        build.levels()


_AVX512 = "avx2 fma avx512f avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (f"flags : fpu {_AVX512} avx512_bf16 amx_tile amx_bf16 amx_int8", "amx avx512-bf16 avx512 avx2 portable"),
        (f"flags : {_AVX512} avx512_bf16", "avx512-bf16 avx512 avx2 portable"),
        (f"flags : {_AVX512}", "avx512 avx2 portable"),
        ("flags : avx2 fma", "avx2 portable"),
        ("flags : avx2", "portable"),
        ("Features : fp asimd bf16", "portable"),  # ARM
        (None, "portable"),  # no Linux
    ],
)
def test_each_processor_may_use_what_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None, expected: str
) -> None:
    monkeypatch.delenv("UNROLLED_KERNELS", raising=False)
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(f"processor : 0\n{cpuinfo}\n", encoding="utf-8")
    monkeypatch.setattr(build, "_CPUINFO", file)
    monkeypatch.setattr(build, "processor_flags", build.processor_flags.__wrapped__)
    assert build.levels() == expected.split()


def test_levels_and_versions_do_not_share_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {build.library_path(name) for name in build.LEVELS}
    assert len(paths) == len(build.LEVELS)
    (tmp_path / "gemm.h~").touch()  # an editor's
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for source in build.SOURCES.iterdir():
        shutil.copy(source, tmp_path)
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert {build.library_path(name) for name in build.LEVELS} == paths
    monkeypatch.setattr("torch.__version__", "1.0")
    assert not {build.library_path(name) for name in build.LEVELS} & paths


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        ("/nowhere/g++", "did not compile: /nowhere/g\\+\\+: No such file"),
        ("false", "did not compile: false ended with status 1"),
        ("sh -c 'kill -9 $$'", "did not compile: sh ended with SIGKILL"),
        ("true", "did not compile: true made no library"),  # it says it has compiled, and has not
    ],
)
def test_a_build_that_fails_is_said_and_leaves_nothing(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, said: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    abandoned = empty_cache / "kernels" / ".build-killed"
    abandoned.mkdir(parents=True)
    os.utime(abandoned, (0, 0))
    with pytest.raises(UnrolledError, match=f"the kernels {said}"):
        build.build()
    assert list((empty_cache / "kernels").iterdir()) == []


def test_a_damaged_library_is_not_loaded_and_is_built_again(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.library_path(ABLE[0])
    path.parent.mkdir()
    path.write_bytes(b"\x7fELF" + bytes(1000))
    assert not build.is_whole(path)
    status = [sys.executable, "-m", "unrolled", "kernels", "status", "--json"]
    done = subprocess.run(status, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["in_use"] == "none"
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(UnrolledError, match="false ended with status 1"):
        build.build()


_LATER = """
import os, shutil, sys
from unrolled.kernels import build
there = build.library_path(sys.argv[1])
os.environ["UNROLLED_CACHE"] = sys.argv[2]
assert build.library() is None and build.in_use() == "none"
path = build.library_path(sys.argv[1])
path.parent.mkdir()
for suffix in (".so", ".sha256"):
    shutil.copy(there.with_suffix(suffix), path.with_suffix(suffix))
assert build.build() == (sys.argv[1], path) and build.library() is not None
os.environ["UNROLLED_KERNELS"] = "portable"
print(build.in_use())
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="there is no g++ on Linux")
@pytest.mark.skipif(os.environ.get("UNROLLED_KERNELS") == "off", reason="they are switched off")
def test_where_there_is_a_compiler_there_are_kernels() -> None:
    """Else all that is tested of them elsewhere would be skipped, and nobody told."""
    assert build.build()[0] == build.in_use()


@pytest.mark.skipif(BUILT is None, reason="the kernels are not built: unrolled kernels build")
@pytest.mark.parametrize(
    ("instead", "said"),
    [
        ("echo 'error: unknown option -mavx2' >&2; exit 1", "did not compile: error: unknown option -mavx2"),
        ('echo no library > "$made"; exit', "do not run here: the library cannot be loaded"),
    ],
)
def test_where_the_best_level_fails_it_is_told_and_the_next_is_built(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, instead: str, said: str
) -> None:
    compiler = empty_cache / "cxx"
    finds_its_output = 'for made; do :; done; case "$*" in *-mavx2*)'
    script = f"#!/bin/sh\n{finds_its_output} {instead};; esac\ncp '{BUILT}' \"$made\"\n"
    compiler.write_text(script, encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "processor_flags", lambda: build.LEVELS["avx2"].flags)
    told = list[str]()
    assert build.build(progress=told.append) == ("portable", build.library_path("portable"))
    assert told[1].startswith(f"avx2: the kernels {said}")
    assert not build.is_whole(build.library_path("avx2"))


@pytest.mark.skipif(BUILT is None, reason="the kernels are not built: unrolled kernels build")
def test_what_another_process_built_is_taken_and_what_runs_is_what_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _LATER, build.in_use(), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == build.in_use()


@pytest.mark.skipif(BUILT is None, reason="the kernels are not built: unrolled kernels build")
def test_a_library_that_is_whole_and_does_not_load_is_built_again(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, path = empty_cache / "cxx", build.library_path("portable")
    compiler.write_text(f"#!/bin/sh\nfor made; do :; done\ncp '{BUILT}' \"$made\"\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("UNROLLED_KERNELS", "portable")
    path.parent.mkdir()
    path.write_bytes(b"no library")
    path.with_suffix(".sha256").write_text(sha256_of(path))
    assert build.is_whole(path)
    assert build.opened(path) is None
    assert build.build() == ("portable", path)
    assert build.opened(path) is not None


def test_a_training_compiles_nothing_and_goes_on_after_a_build_that_failed(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, asked = empty_cache / "cxx", empty_cache / "asked"
    compiler.write_text(f"#!/bin/sh\necho once >> '{asked}'\nexit 1\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("UNROLLED_KERNELS", "portable")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "unrolled", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("kernels", "build")
    assert done.returncode == 2
    assert "without them all runs on PyTorch alone" in done.stderr.splitlines()[-1]
    small = ("--data", "toy", "--max-epochs", "1", "--model.hidden-sizes", "8", "--training.batch-size", "200")
    done = run("train", "demo", *small, "--out", str(empty_cache / "run"))
    assert done.returncode == 0
    assert "on PyTorch alone; unrolled kernels build makes this faster" in done.stderr
    monkeypatch.setenv("UNROLLED_KERNELS", "off")
    done = run("train", "demo", *small, "--out", str(empty_cache / "other"))
    assert done.returncode == 0
    assert "on PyTorch alone: UNROLLED_KERNELS is off" in done.stderr
    assert asked.read_text(encoding="utf-8") == "once\n"


def test_without_a_compiler_the_way_out_is_named(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(empty_cache))
    with pytest.raises(UnrolledError, match="no C\\+\\+ compiler: install g\\+\\+"):
        build.build()


@needs_compiler
@pytest.mark.parametrize("level", ABLE[1:])
def test_two_may_build_at_once_and_every_level_agrees_with_the_plain_twins(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    monkeypatch.setenv("UNROLLED_KERNELS", level)
    command = [sys.executable, "-m", "unrolled", "kernels", "build"]
    with ThreadPoolExecutor() as pool:
        builds = [pool.submit(subprocess.run, command, capture_output=True, text=True, check=True) for _ in range(2)]
        said = {done.result().stdout.strip() for done in builds}
    (library,) = (empty_cache / "kernels").glob("*.so")
    assert said == {f"{level}: {library}"}
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent / "test_ops.py")]
    done = subprocess.run(tests, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "skipped" not in done.stdout
