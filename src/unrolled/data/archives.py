"""Texts out of a tar or zip archive from a stranger.

Nothing is ever unpacked to the path a member names: the wanted members' bytes are copied to files whose names are
ours. Links, devices, paths that lead outside, too many members and too many bytes are refused.
"""

import bz2
import gzip
import lzma
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from unrolled.errors import UnrolledError
from unrolled.files import written_whole

MAX_MEMBERS = 10_000
MAX_BYTES = 4 << 30
"""Most bytes that an archive may unpack to, all members together."""

_LONGEST_READ = 4 << 20
_LONGEST_HEADER = 4_096
_DAMAGED = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, OSError, RuntimeError, NotImplementedError, ValueError),
)


def is_archive(path: Path) -> bool:
    """Whether the file's content is a tar (plain, gz, bz2, xz) or a zip, whatever it is called.

    Raises:
        UnrolledError: it is a tar, and a bomb.
    """
    return _is_tar(path) or zipfile.is_zipfile(path)


def extract(path: Path, choose: Callable[[list[str]], dict[str, str]], folder: Path) -> dict[str, Path]:
    """Copies the members that `choose` picks.

    Args:
        path: the archive.
        choose: given the names of all files in it, returns {file name to write: member's name}.
        folder: where the copies go.

    Raises:
        UnrolledError: the archive is damaged or unsafe.
    """
    try:
        with _members(path) as members:
            chosen = choose([name for name in members if not re.search(r"(^|/)(\.(?!/)|__MACOSX/)", name)])
            left = MAX_BYTES
            for target, member in chosen.items():
                with members[member]() as source, written_whole(folder / target) as copy:
                    while block := source.read(1 << 20):
                        left -= len(block)
                        if left < 0:
                            raise UnrolledError(f"{path.name} unpacks to more than {MAX_BYTES:,} bytes")
                        copy.write(block)
    except UnrolledError:
        raise
    except _DAMAGED as error:
        raise UnrolledError(f"{path.name} cannot be unpacked: {_first_line(error)}") from error
    return {target: folder / target for target in chosen}


@contextmanager
def _members(path: Path) -> Iterator[dict[str, Callable[[], IO[bytes]]]]:
    """The regular files of the archive, each with what opens it.

    A tar's members are checked as their headers come by, before their content is unpacked to find the next.
    """
    files: dict[str, Callable[[], IO[bytes]]] = {}
    guard = _Guard(path.name)
    if zipfile.is_zipfile(path) and not _is_tar(path):  # a tar may end with a zip
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                guard.admit(info.filename, info.file_size, kind in (0, stat.S_IFREG, stat.S_IFDIR))
                if info.filename and not info.is_dir():
                    files[info.filename] = partial(archive.open, info)
            yield files
    else:
        with _open_tar(path) as archive:
            for member in archive:
                guard.admit(member.name, member.size, member.isreg() or member.isdir())
                if member.isreg():
                    files[member.name] = partial(_open_member, archive, member)
            _read_to_its_end(archive)
            yield files


def _is_tar(path: Path) -> bool:
    try:
        with _open_tar(path) as archive:
            return archive.next() is not None
    except UnrolledError:
        raise
    except _DAMAGED:
        return False


def _read_to_its_end(archive: tarfile.TarFile) -> None:
    """What follows the last member is its end, where Python takes any damaged header for it; and the sums of a gz or xz
    stand behind that.

    Raises:
        tarfile.ReadError: a header is damaged.
    """
    stream = archive.fileobj
    assert stream is not None
    stream.seek(archive.offset)
    if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("a member's header is damaged")
    try:
        while stream.read(1 << 20):
            pass
    except gzip.BadGzipFile as error:
        if "Not a gzipped file" not in str(error):  # something behind the end, which gunzip leaves out, too
            raise


@contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar over a stream that ends in an error where it grows too long, headers included."""
    with path.open("rb") as file:
        start = file.read(6)
    opens = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
    with (
        opens.get(start[:2], open)(path, "rb") as stream,
        tarfile.open(fileobj=_Bounded(stream, path.name), mode="r:", tarinfo=_Header) as archive,  # type: ignore
    ):
        yield archive


class _Header(tarfile.TarInfo):
    """Refuses long extended headers, over which older Pythons take quadratic time (CVE-2024-6232)."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTENDED and header.size > _LONGEST_HEADER:
            raise UnrolledError(f"the archive has a header of {header.size:,} bytes; it is refused")
        return header


_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


class _Bounded:
    """A stream of an archive's unpacked bytes that refuses to be a bomb.

    tarfile reads a member's extended header (a long name, say) whole, before anyone has seen the member.
    """

    def __init__(self, stream: IO[bytes], archive_name: str) -> None:
        self.stream, self.archive_name = stream, archive_name
        self.tell = stream.tell

    def read(self, size: int = -1) -> bytes:
        self._refuse_beyond(self.tell() + max(size, 0))
        if not 0 <= size <= _LONGEST_READ:
            raise UnrolledError(f"{self.archive_name} has a header of {size:,} bytes; the archive is refused")
        return self.stream.read(size)

    def seek(self, position: int, whence: int = 0) -> int:
        self._refuse_beyond(position)
        return self.stream.seek(position, whence)

    def _refuse_beyond(self, position: int) -> None:
        if position > MAX_BYTES + _LONGEST_READ:
            raise UnrolledError(f"{self.archive_name} unpacks to more than {MAX_BYTES:,} bytes; the archive is refused")


def _open_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member)
    assert content is not None  # only for links and devices, which are refused above
    return content


class _Guard:
    """Counts an archive's members and bytes, and refuses what a plain archive of texts never holds."""

    def __init__(self, archive_name: str) -> None:
        self.archive_name = archive_name
        self.count = self.total = 0

    def admit(self, name: str, size: int, plain: bool) -> None:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        self.count += 1
        self.total += size
        if name.startswith(("/", "\\")) or ".." in parts or (parts and ":" in parts[0][1:2]):
            raise UnrolledError(f"{self.archive_name}: {name!r} would lie outside its folder; the archive is refused")
        if not plain:
            raise UnrolledError(f"{self.archive_name}: {name!r} is a link or device; the archive is refused")
        if self.count > MAX_MEMBERS:
            raise UnrolledError(f"{self.archive_name} holds more than {MAX_MEMBERS:,} files; the archive is refused")
        if self.total > MAX_BYTES:
            raise UnrolledError(f"{self.archive_name} unpacks to more than {MAX_BYTES:,} bytes; the archive is refused")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
