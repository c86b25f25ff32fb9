"""What a user's bytes become before they are a corpus: standard input a file, other encodings UTF-8, in the cache."""

import codecs
import hashlib
import os
import sys
from pathlib import Path

from unrolled.errors import UnrolledError
from unrolled.files import cache_folder, sha256_of, written_whole


def spooled() -> Path:
    """Standard input as a file in the cache, named by its hash.

    Raises:
        UnrolledError: it is closed.
    """
    if sys.stdin is None:
        raise UnrolledError("standard input is closed")
    stream = sys.stdin.buffer
    digest = hashlib.sha256()
    incoming = cache_folder() / "texts" / f"incoming-{os.getpid()}"
    with written_whole(incoming) as file:
        while block := stream.read(1 << 20):
            digest.update(block)
            file.write(block)
    path = incoming.with_name(f"stdin-{digest.hexdigest()}.txt")
    incoming.replace(path)
    return path


def _reason(error: UnicodeError) -> str:
    return error.reason if isinstance(error, UnicodeDecodeError | UnicodeEncodeError) else str(error)


def recoded(path: Path, encoding: str | None) -> Path:
    """`path`, or where it is not UTF-8 by the user's word, a UTF-8 copy in the cache.

    Raises:
        UnrolledError: there is no such encoding, or the file is not in it.
    """
    if encoding is None:
        return path
    try:
        codec = codecs.lookup(encoding)
        "".encode(encoding)  # refuses codecs that are not of text, such as hex
    except (LookupError, ValueError) as error:
        raise UnrolledError(f"no encoding named {encoding!r}; try utf-8, utf-16, latin-1, cp1252") from error
    if codec.name == "utf-8":
        return path
    copy = cache_folder() / "texts" / f"{sha256_of(path)}-{codec.name}.txt"
    if not copy.is_file():
        decoder = codec.incrementaldecoder()
        with path.open("rb") as file, written_whole(copy) as target:
            try:
                while block := file.read(1 << 20):
                    target.write(decoder.decode(block).encode())
                target.write(decoder.decode(b"", final=True).encode())
            except UnicodeError as error:
                before = f"before byte {file.tell():,}"
                raise UnrolledError(f"{path.name} is not {encoding}, {before}: {_reason(error)}") from error
    return copy
