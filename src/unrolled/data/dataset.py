"""A corpus as ids: memory-mapped, in the smallest integer type, in a cache keyed by the hash of the text.

A second start only hashes text and ids, and memory does not grow with the corpus, but for the distinct
words of one whose vocabulary is learnt.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from unrolled.data.reading import Corpus, read_bytes, read_lines, read_text
from unrolled.data.tokens import Tokenizer, Vocabulary, learn
from unrolled.errors import UnrolledError
from unrolled.files import cache_folder, sha256_of, write_whole, written_whole

_LEFT_S = 86_400
_FORMAT = 2
"""Raised when the ids of the same text and settings would come out otherwise than before."""


@dataclass(frozen=True)
class SplitInfo:
    """What is known of a split without reading it: hash of the text, counts."""

    sha256: str
    tokens: int
    unknown: int


@dataclass(frozen=True)
class Dataset:
    """A corpus as ids: memory-mapped, in the smallest integer type, in the cache under `key`."""

    name: str
    note: str
    key: str
    tokenizer: Tokenizer
    ids: dict[str, np.ndarray]
    splits: dict[str, SplitInfo]


def prepare(corpus: Corpus, vocabulary: Vocabulary) -> Dataset:
    """A corpus with the tokenizer learnt from its training text, and its ids; from the cache where they are there."""
    return _cached(corpus, asdict(vocabulary), lambda folder: learn(corpus, vocabulary, folder))


def prepare_with(corpus: Corpus, tokenizer: Tokenizer) -> Dataset:
    """A corpus as the ids of a tokenizer that was learnt before."""
    return _cached(corpus, {"tokenizer": tokenizer.to_json()}, lambda folder: tokenizer)


def find_prepared(key: str) -> Dataset | None:
    """The dataset of that key, if the cache still holds it; then the corpus itself is not needed."""
    try:
        return _open(cache_folder() / "ids" / key)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # not there, or damaged
        return None


def _cached(corpus: Corpus, settings: dict[str, Any], make: Callable[[Path], Tokenizer]) -> Dataset:
    hashes = {split: part.sha256 for split, part in corpus.splits.items()}
    identity = json.dumps([_FORMAT, corpus.encoding, settings, hashes], sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()
    if (ready := find_prepared(key)) is not None:
        return replace(ready, name=corpus.name, note=corpus.note)
    folder = cache_folder() / "ids" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".incoming-*"):  # by one that was killed
        with suppress(FileNotFoundError):  # another has renamed it
            if time.time() - left.stat().st_mtime > _LEFT_S:
                shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=".incoming-", dir=folder.parent))
    try:
        tokenizer = make(work)
        infos = {split: _write_ids(corpus, split, tokenizer, work) for split in corpus.splits}
        write_whole(work / "tokenizer.json", tokenizer.to_json().encode())
        about = {
            "name": corpus.name,
            "note": corpus.note,
            "splits": {split: asdict(info) for split, info in infos.items()},
            "files": {file.name: sha256_of(file) for file in sorted(work.iterdir())},
        }
        write_whole(work / "dataset.json", json.dumps(about).encode())
        _refuse_changed(corpus)
        try:
            work.rename(folder)
        except OSError:  # there is a damaged one, or another process was first
            if find_prepared(key) is None:
                shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
                work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _open(folder, tokenizer)


def _refuse_changed(corpus: Corpus) -> None:
    """What was encoded is to be what was hashed."""
    for part in corpus.splits.values():
        if sha256_of(part.path, part.start, part.stop) != part.sha256:
            raise UnrolledError(f"{part.path} changed while it was read; start again")


def _open(folder: Path, tokenizer: Tokenizer | None = None) -> Dataset:
    about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    for name, sha256 in about["files"].items():
        if tokenizer is None and sha256_of(folder / name) != sha256:
            raise ValueError(f"{folder / name} is damaged")
    tokenizer = tokenizer or Tokenizer.load(folder / "tokenizer.json")
    splits = {split: SplitInfo(**info) for split, info in about["splits"].items()}
    ids: dict[str, np.ndarray] = {s: np.memmap(folder / f"{s}.ids", tokenizer.dtype, mode="r") for s in splits}
    if any(len(ids[split]) != info.tokens for split, info in splits.items()):
        raise ValueError(f"{folder} is damaged")
    return Dataset(about["name"], about["note"], folder.name, tokenizer, ids, splits)


def _write_ids(corpus: Corpus, split: str, tokenizer: Tokenizer, folder: Path) -> SplitInfo:
    path = folder / f"{split}.ids"
    if not path.exists():
        with written_whole(path) as file:
            for ids in encode_split(corpus, split, tokenizer):
                file.write(ids.tobytes())
    tokens = unknown = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            ids = np.frombuffer(block, tokenizer.dtype)
            tokens += len(ids)
            unknown += 0 if tokenizer.unknown_id is None else int(np.count_nonzero(ids == tokenizer.unknown_id))
    if tokens == 0:
        raise UnrolledError(f"{corpus.name}: the {split} split holds no token; give more text")
    return SplitInfo(corpus.splits[split].sha256, tokens, unknown)


def encode_split(corpus: Corpus, split: str, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The ids of a split, piece by piece."""
    if tokenizer.unit == "byte":
        return (np.frombuffer(piece, np.uint8) for piece in read_bytes(corpus, split))
    if tokenizer.unit == "character":
        return map(tokenizer.encode, read_text(corpus, split))
    return map(tokenizer.encode, read_lines(corpus, split))
