"""A corpus by name, path or archive; and what is answered where the text is not as it should be."""

import functools
import http.server
import io
import os
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis.strategies import lists, sampled_from

from unrolled import UnrolledError
from unrolled.data import archives, reading, text
from unrolled.data.dataset import prepare
from unrolled.data.reading import read_lines, read_text
from unrolled.data.text import KNOWN, fetch, import_corpus, open_corpus, open_text
from unrolled.data.tokens import Vocabulary

Write = Callable[[str, bytes | str], Path]
LINES = "".join(f"line number {number} of a text\n" for number in range(200))


def whole(path: Path, encoding: str | None = "utf-8") -> str:
    corpus = open_corpus(str(path), encoding)
    return "".join(piece for split in corpus.splits for piece in read_text(corpus, split))


def test_one_file_is_cut_at_line_ends_into_90_5_5(write: Write) -> None:
    corpus = open_corpus(str(write("mine.txt", LINES)))
    texts = {split: "".join(read_text(corpus, split)) for split in corpus.splits}
    assert "".join(texts.values()) == LINES
    assert [split.endswith("\n") for split in texts.values()] == [True] * 3
    assert [round(len(split) / len(LINES), 2) for split in texts.values()] == [0.90, 0.05, 0.05]
    assert "90/5/5" in corpus.note


# ------------------------------------------------------------------------------------------------ odd but good text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"\xef\xbb\xbf" + LINES.encode(), LINES, id="byte order mark"),
        pytest.param(LINES.replace("\n", "\r\n").encode(), LINES, id="CRLF"),
        pytest.param(LINES.replace("\n", "\r").encode(), LINES, id="CR"),
        pytest.param(LINES.rstrip("\n").encode(), LINES.rstrip("\n"), id="no final newline"),
        pytest.param(LINES.replace("\n", "\n\n\n").encode(), LINES.replace("\n", "\n\n\n"), id="empty lines"),
        pytest.param("é à ü 漢字 😀\n".encode() * 99, "é à ü 漢字 😀\n" * 99, id="beyond ASCII"),
    ],
)
@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 1 << 18])
def test_text_is_read_as_lines_of_utf8(
    write: Write, monkeypatch: pytest.MonkeyPatch, content: bytes, expected: str, piece: int
) -> None:
    monkeypatch.setattr(reading, "_PIECE", piece)
    assert whole(write("odd.txt", content)) == expected


def test_a_last_line_without_its_end_is_a_line_all_the_same(write: Write) -> None:
    corpus = open_text(str(write("short.txt", "one\ntwo")))
    assert corpus is not None
    assert "".join(read_lines(corpus, "text")) == "one\ntwo\n"


def test_a_line_end_of_two_characters_is_never_cut(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PIECE", 64)
    monkeypatch.setattr(reading, "_LONGEST_WORD", 100)
    for length in range(118, 132):
        content = b"x" * length + b"\r\nabc def\n" * 9 + b"\r\n" * 150 + b"end\n"
        corpus = open_text(str(write("mine.txt", content)))
        assert corpus is not None
        assert "".join(read_text(corpus, "text")) == content.decode().replace("\r\n", "\n")


def test_one_endless_line_is_cut_between_words(write: Write) -> None:
    corpus = open_corpus(str(write("endless.txt", "word " * 100_000)))
    assert ["".join(read_text(corpus, split)).strip()[:5] for split in corpus.splits] == ["word "] * 3


@pytest.mark.parametrize("space", ["\t", "\v", "\u3000", "\xa0"])
def test_whatever_parts_words_is_where_an_endless_line_is_cut(
    write: Write, monkeypatch: pytest.MonkeyPatch, space: str
) -> None:
    monkeypatch.setattr(reading, "_LONGEST_WORD", 100)
    monkeypatch.setattr(reading, "_PIECE", 64)
    corpus = open_text(str(write("endless.txt", "wörter " + f"wörter{space}" * 5_000)))
    for split in corpus.splits:
        assert {word for piece in read_text(corpus, split) for word in piece.split()} == {"wörter"}


def test_much_white_space_of_any_kind_is_read_in_no_time(write: Write) -> None:
    for space in ("\xa0\u3000" * 400_000, " " * 8_000_000):
        text = f"a{space}b\n"
        assert whole(write("wide.txt", text)) == text


def test_a_long_last_line_leaves_no_split_empty(write: Write) -> None:
    corpus = open_corpus(str(write("mine.txt", LINES * 9 + "word " * 1_000 + "\n")))
    assert min(split.stop - split.start for split in corpus.splits.values()) > 1_000


def test_one_endless_word_is_cut_between_characters(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_LONGEST_WORD", 100)
    monkeypatch.setattr(reading, "_PIECE", 64)
    path = write("endless.txt", "é漢" * 5_000)
    assert whole(path) == "é漢" * 5_000
    assert prepare(open_corpus(str(path)), Vocabulary("character")).splits["train"].tokens == 9_000


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "cp1252", "UTF8"])
def test_other_encodings_are_read_when_named(write: Write, encoding: str) -> None:
    lines = LINES.replace("text", "café")
    assert whole(write("other.txt", lines.encode(encoding)), encoding) == lines


@given(lists(sampled_from([*"a é\t\n\xa0\x85\u3000", "bc", "  ", "\r\n"]), min_size=60, max_size=200))
def test_pieces_end_where_words_do(parts: list[str]) -> None:
    content = "".join(parts)
    path = Path(os.environ["UNROLLED_CACHE"]) / "pieces.txt"
    path.write_bytes(content.encode())
    corpus = open_text(str(path))
    assert corpus is not None
    words = content.split()
    original, reading._PIECE = reading._PIECE, 16
    try:
        pieces = list(read_text(corpus, "text"))
    finally:
        reading._PIECE = original
    assert [word for piece in pieces for word in piece.split()] == words
    assert "".join(pieces) == content.replace("\r\n", "\n")
    assert all(piece == piece.rstrip() for piece in pieces[:-1])  # white space is not parted


# ------------------------------------------------------------------------------------------------ bad text, one line


def message(name: str | Path, encoding: str | None = "utf-8") -> str:
    with pytest.raises(UnrolledError) as caught:
        prepare(open_corpus(str(name), encoding), Vocabulary())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bytes_that_are_not_utf8_are_named_by_line_and_byte(write: Write) -> None:
    path = write("mine.txt", b"a good line\nseven c\xff\n" + LINES.encode())
    assert message(path) == "mine.txt, line 2, byte 8: not UTF-8 (0xff); convert the file or pass --encoding"


def test_the_line_is_right_far_into_a_file_and_behind_a_byte_order_mark(write: Write) -> None:
    path = write("mine.txt", b"\xef\xbb\xbf" + LINES.encode() * 90 + b"ab\xe9\n" + LINES.encode())
    assert message(path).startswith("mine.txt, line 18001, byte 3: not UTF-8 (0xe9)")


def test_a_nul_is_named_by_line_and_byte(write: Write) -> None:
    assert message(write("mine.txt", b"fine\nno\0t\n" + LINES.encode())).startswith("mine.txt, line 2, byte 3: a NUL")


def test_nuls_and_bad_utf8_are_bytes_like_others_to_the_byte_tokenizer(write: Write) -> None:
    path = write("mine.bin", bytes(range(256)) * 100)
    assert prepare(open_corpus(str(path), None), Vocabulary("byte")).splits["train"].tokens == 23_040


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "mine.txt is empty"), (b"one", "the valid split holds no token; give more text")],
)
def test_too_little_text_is_said(write: Write, content: bytes, expected: str) -> None:
    path = write("mine.txt", content)
    with pytest.raises(UnrolledError, match=expected):
        prepare(open_corpus(str(path)), Vocabulary())


def test_an_unknown_name_gets_the_nearest() -> None:
    assert message("ptbb") == "no corpus or file 'ptbb'; did you mean 'ptb'?"
    assert "give a file, a folder, an archive" in message("nothing-like-it")


def test_an_unknown_encoding_is_named(write: Write) -> None:
    assert "no encoding named 'klingon'" in message(write("mine.txt", LINES), "klingon")
    assert "mine.txt is not ascii" in message(write("mine.txt", "é" + LINES), "ascii")


def test_a_compressed_file_is_not_read_as_text(write: Write) -> None:
    import gzip

    assert "mine.txt.gz is compressed; unpack it first: gunzip -c" in message(
        write("mine.txt.gz", gzip.compress(LINES.encode()))
    )


# ------------------------------------------------------------------------------------------------ folders and archives


def test_a_folder_gives_its_splits_by_name(write: Write, tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write(f"corpus/my.{split}.txt", split * 3 + "\n")
    corpus = open_corpus(str(tmp_path / "corpus"))
    assert {split: "".join(read_text(corpus, split)) for split in corpus.splits} == {
        "train": "traintraintrain\n",
        "valid": "validvalidvalid\n",
        "test": "testtesttest\n",
    }


def test_a_folder_that_lacks_a_split_or_has_two_is_refused(write: Write, tmp_path: Path) -> None:
    write("corpus/train.txt", "a\n")
    write("corpus/test.txt", "a\n")
    assert "corpus holds no file named *valid*" in message(tmp_path / "corpus")
    write("corpus/valid.txt", "a\n")
    write("corpus/dev.txt", "a\n")
    assert "more than one file for valid: dev.txt and valid.txt" in message(tmp_path / "corpus")


def make_tar(path: Path, members: dict[str, bytes], *special: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in special:
            archive.addfile(info)
    return path


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


SPLIT_FILES = {f"deep/in/{split}.txt": f"{split} text here\n".encode() for split in ("train", "valid", "test")}


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_an_archive_gives_its_splits_by_name(tmp_path: Path, make: Callable[..., Path]) -> None:
    corpus = open_corpus(str(make(tmp_path / "corpus", SPLIT_FILES)))
    assert "".join(read_text(corpus, "valid")) == "valid text here\n"


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_of_an_archive_of_a_folder_the_hidden_files_are_left_out(tmp_path: Path, make: Callable[..., Path]) -> None:
    hidden = {"./._train.txt": b"x", "./.git/train.txt": b"x", "__MACOSX/train.txt": b"x"}
    files = {f"./{name}": content for name, content in SPLIT_FILES.items()}
    corpus = open_corpus(str(make(tmp_path / "corpus", hidden | files)))
    assert "".join(read_text(corpus, "train")) == "train text here\n"


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_an_archive_of_one_file_is_one_text(tmp_path: Path, make: Callable[..., Path]) -> None:
    assert whole(make(tmp_path / "corpus", {"novel": LINES.encode()})) == LINES


@pytest.mark.parametrize("make", [make_tar, make_zip])
@pytest.mark.parametrize(
    "name", ["../train.txt", "/etc/train.txt", "a/../../train.txt", "..\\train.txt", "C:\\train.txt"]
)
def test_a_path_outside_is_refused_and_nothing_is_written(tmp_path: Path, make: Callable[..., Path], name: str) -> None:
    path = make(tmp_path / "corpus", {name: b"x\n"} | SPLIT_FILES)
    before = set(tmp_path.rglob("*"))
    assert "would lie outside its folder; the archive is refused" in message(path)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    link = tarfile.TarInfo("train.txt")
    link.type, link.linkname = kind, "/etc/passwd"
    assert "is a link or device" in message(
        make_tar(tmp_path / "links.tgz", {"valid.txt": b"v", "test.txt": b"t"}, link)
    )


def test_a_tar_with_an_endless_header_is_refused(tmp_path: Path) -> None:
    long = tarfile.TarInfo("a" * (8 << 20))
    assert "is refused" in message(make_tar(tmp_path / "header.tgz", {"train.txt": b"x"}, long))


def test_a_tar_whose_header_would_take_quadratic_time_is_refused_at_once(tmp_path: Path) -> None:
    header = tarfile.TarInfo("pax")
    header.type = tarfile.XHDTYPE
    digits = b"1" * 200_000
    header.size = len(digits)
    path = tmp_path / "digits.tgz"
    with tarfile.open(path, "w:gz") as archive:
        archive.fileobj.write(header.tobuf(tarfile.USTAR_FORMAT) + digits + bytes(-len(digits) % 512))  # type: ignore
    assert "a header of 200,000 bytes; it is refused" in message(path)


def test_a_zip_with_a_nameless_member_is_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "nameless.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mine.txt", "the cat sat\n" * 50)
        archive.writestr("x", "nothing")
    path.write_bytes(
        path.read_bytes().replace(b"\x01\x00\x00\x00\x00\x00\x00\x00", b"\x01\x00\x00\x00\x00\x00\x00\x00")
    )
    with zipfile.ZipFile(path, "a") as archive:
        archive.filelist[-1].filename = ""
        archive._didModify = True  # type: ignore
    assert set(open_corpus(str(path)).splits) == {"train", "valid", "test"}


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz", ""])
def test_a_tar_is_read_or_named_whatever_its_compression_and_damage(tmp_path: Path, mode: str) -> None:
    path = tmp_path / f"corpus.tar.{mode}"
    with tarfile.open(path, f"w:{mode}") as archive:  # type: ignore[call-overload]
        for split in ("train", "valid", "test"):
            info = tarfile.TarInfo(f"{split}.txt")
            content = os.urandom(3_000).hex().encode()
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    corpus = open_corpus(str(path))
    texts = {split: "".join(read_text(corpus, split)) for split in ("train", "valid", "test")}
    whole_file = path.read_bytes()
    for place in range(100, len(whole_file), len(whole_file) // 40):
        damaged = bytearray(whole_file)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        with suppress(UnrolledError):  # and nothing else
            corpus = open_corpus(str(path))
            if mode:  # which have sums of their own
                assert {split: "".join(read_text(corpus, split)) for split in corpus.splits} == texts
            elif place > 512:
                assert corpus.splits["valid"].name == "valid.txt"


def test_a_tar_is_a_tar_though_its_last_member_be_a_zip(tmp_path: Path) -> None:
    inner = make_zip(tmp_path / "notes.zip", {"old.txt": b"other text\n"}).read_bytes()
    with tarfile.open(tmp_path / "corpus.tar", "w:") as archive:
        for name, content in ({"PK.txt": b"x"} | SPLIT_FILES | {"notes.zip": inner}).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    corpus = open_corpus(str(tmp_path / "corpus.tar"))
    assert "".join(read_text(corpus, "train")) == "train text here\n"


def test_what_stands_before_a_zip_or_behind_a_gz_does_not_matter(tmp_path: Path) -> None:
    inner = make_zip(tmp_path / "corpus.zip", SPLIT_FILES).read_bytes()
    (tmp_path / "corpus.exe").write_bytes(b"MZ unpacks itself" + inner)
    packed = make_tar(tmp_path / "corpus.tar.gz", SPLIT_FILES)
    packed.write_bytes(packed.read_bytes() + b"and more")
    for name in ("corpus.exe", "corpus.tar.gz"):
        corpus = open_corpus(str(tmp_path / name))
        assert "".join(read_text(corpus, "train")) == "train text here\n"


def test_one_file_for_two_splits_is_refused(write: Write, tmp_path: Path) -> None:
    write("corpus/train_test.txt", "a\n")
    write("corpus/valid.txt", "a\n")
    assert "train_test.txt would be both train and test" in message(tmp_path / "corpus")


def test_links_in_a_zip_are_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "links.zip", SPLIT_FILES)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("train")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    assert "is a link or device" in message(path)


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_bombs_are_refused(tmp_path: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 100_000)
    monkeypatch.setattr(archives, "MAX_MEMBERS", 50)
    assert "unpacks to more than" in message(make(tmp_path / "large", {"train.txt": bytes(100_001)} | SPLIT_FILES))
    assert "holds more than 50 files" in message(make(tmp_path / "many", {f"{n}.txt": b"x" for n in range(51)}))


def test_a_bomb_that_lies_about_its_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_zip(tmp_path / "liar.zip", {"text.txt": b"a" * 1_000_000})
    size = (1_000_000).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (1_000).to_bytes(4, "little")))
    monkeypatch.setattr(archives, "MAX_BYTES", 100_000)
    assert "liar.zip" in message(path)


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_a_damaged_archive_is_one_line(tmp_path: Path, make: Callable[..., Path]) -> None:
    path = make(tmp_path / "corpus", {f"{s}.txt": os.urandom(5_000).hex().encode() for s in ("train", "valid", "test")})
    content = bytearray(path.read_bytes())
    content[3_000:3_050] = os.urandom(50)
    path.write_bytes(content)
    assert "corpus" in message(path)


# ------------------------------------------------------------------------------------------------ known corpora


def test_ptb_is_read_from_the_archive_as_it_lies_there(ptb: str) -> None:
    corpus = open_corpus(ptb)
    assert tuple(split.sha256 for split in corpus.splits.values()) == KNOWN["ptb"].sha256


def test_text8_is_cut_90_5_5_and_says_so(text8: str) -> None:
    corpus = open_corpus(text8)
    sizes = [split.stop - split.start for split in corpus.splits.values()]
    assert sizes[0] == sum(sizes) * 90 // 100
    assert sizes[1] == sizes[2]
    assert "text8, cut 90/5/5" in corpus.note
    assert next(read_text(corpus, "train")).startswith(" anarchism originated")


def test_text8_is_checked(write: Write, tmp_path: Path) -> None:
    assert import_corpus("text8", write("text8", b"a prefix of it " * 100)).note.startswith(
        "the first 1,500 characters"
    )
    with pytest.raises(UnrolledError, match="not text8: it holds b'C'"):
        import_corpus("text8", write("bad/text8", b"it has no Capitals"))
    with pytest.raises(UnrolledError, match="it holds no text8"):
        import_corpus("text8", make_zip(tmp_path / "other.zip", {"enwik8": b"x"}))


def test_a_wrong_ptb_is_refused(write: Write, tmp_path: Path) -> None:
    folder = write("ptb.train.txt", "a\n").parent
    write("ptb.valid.txt", "a\n")
    with pytest.raises(UnrolledError, match=r"it holds no ptb\.test\.txt"):
        import_corpus("ptb", folder)
    write("ptb.test.txt", "a\n")
    with pytest.raises(UnrolledError, match=r"is not ptb: ptb\.train\.txt has 2 bytes, not 5,101,618"):
        import_corpus("ptb", folder)
    write("ptb.train.txt", b"a" * 5_101_618)
    with pytest.raises(UnrolledError, match=r"is not ptb: ptb\.train\.txt has SHA-256"):
        import_corpus("ptb", folder)


def test_an_imported_corpus_is_found(ptb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = text.find("ptb")
    monkeypatch.setenv("UNROLLED_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UNROLLED_DATA")
    assert text.find("ptb") is None
    assert source is not None
    import_corpus("ptb", source)
    assert text.find("ptb") == tmp_path / "cache/corpora/ptb/simple-examples.tgz"
    assert open_corpus("ptb", fetch_missing=False).splits["test"].sha256 == KNOWN["ptb"].sha256[2]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address at which this machine serves it."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_corpus_is_fetched_and_checked(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = served
    monkeypatch.setenv("UNROLLED_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("UNROLLED_DATA", raising=False)
    monkeypatch.setitem(KNOWN, "text8", text.KnownCorpus("", f"{address}/text8.zip", "", "text8.zip", ("text8",)))
    make_zip(folder / "text8.zip", {"text8": b"Not Text8"})
    with pytest.raises(UnrolledError, match="is not text8"):
        open_corpus("text8")
    assert text.find("text8") is None
    make_zip(folder / "text8.zip", {"text8": b"some words " * 100})
    assert open_corpus("text8").note.startswith("the first 1,100 characters")


def test_a_dead_link_is_answered_with_the_way_round(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNROLLED_CACHE", str(tmp_path / "cache"))
    for url in (f"{served[1]}/gone.tgz", "http://127.0.0.1:9/simple-examples.tgz"):
        monkeypatch.setitem(
            KNOWN, "ptb", text.KnownCorpus("", url, "try a mirror", "simple-examples.tgz", ("ptb.train.txt",))
        )
        with pytest.raises(UnrolledError) as caught:
            fetch("ptb")
        assert url in str(caught.value)
        assert "get simple-examples.tgz elsewhere (try a mirror), then: unrolled data import ptb" in str(caught.value)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: fetch("ptbb"), "did you mean 'ptb'"),
        (lambda: fetch("toy"), "needs no download"),
        (lambda: import_corpus("toy", Path("x")), "embedded and needs no import"),
        (lambda: import_corpus("ptb", Path("nowhere.tgz")), "no file 'nowhere.tgz'"),
    ],
)
def test_what_cannot_be_fetched_or_imported_is_said(call: Callable[[], object], expected: str) -> None:
    with pytest.raises(UnrolledError, match=expected):
        call()
