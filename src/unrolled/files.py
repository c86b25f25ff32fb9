"""A file is written whole or not at all, and known by its hash."""

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from unrolled.errors import UnrolledError


@contextmanager
def written_whole(path: Path, previous: Path | None = None) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends, and leaves no trace if it fails.

    Written under a temporary name in the same folder, synced, renamed; then the folder is synced. What stood at `path`
    becomes the file `previous`, where that is named.
    """
    if path.exists() and not path.is_file():  # a device would become a file
        raise UnrolledError(f"{path} is no file that can be written over")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            Path(temporary).unlink()
        if isinstance(error, OSError) and error.errno and error.filename in (None, temporary):
            error.filename = str(path)  # the one that its reader knows
        raise
    _sync_folder(path.parent)


def write_whole(path: Path, content: bytes, previous: Path | None = None) -> None:
    """`content` becomes the file `path`, whole or not at all; what was there before, the file `previous`."""
    with written_whole(path, previous) as file:
        file.write(content)


def cache_folder() -> Path:
    """Where downloads, prepared ids and compiled kernels are kept: `UNROLLED_CACHE`, or the user's cache folder."""
    if folder := os.environ.get("UNROLLED_CACHE"):
        return Path(folder)
    import pooch

    return Path(pooch.os_cache("unrolled"))


def sha256_of(path: Path, start: int = 0, stop: int | None = None) -> str:
    """The SHA-256 of a file's bytes, or of those from `start` to before `stop`, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(1 << 20 if stop is None else min(1 << 20, stop - file.tell())):
            digest.update(block)
    return digest.hexdigest()


_ASKING = threading.Lock()


def _umask() -> int:
    with _ASKING:  # who asks has to set it, and set it back
        mask = os.umask(0)
        os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
