"""Text <-> ids. The `tokenizers` library, reading tokenizer.json by itself, is the oracle of the fast twins."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis.strategies import characters, lists, sampled_from, text

from unrolled import UnrolledError
from unrolled.data import dataset as dataset_module
from unrolled.data.backends import LONGEST_BPE_WORD, bpe_backend
from unrolled.data.dataset import find_prepared, prepare, prepare_with
from unrolled.data.text import open_corpus, open_text
from unrolled.data.tokens import Tokenizer, Unit, Vocabulary, smallest_dtype

Write = Callable[[str, bytes | str], Path]
UNITS = ("word", "character", "byte", "bpe")
TRAIN = "the cat sat on the mat\nthe dog sat\n\nle café est là 漢字 😀\n" * 30


@pytest.fixture(scope="module", params=UNITS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Tokenizer:
    path = tmp_path_factory.mktemp("text") / "mine.txt"
    path.write_text(TRAIN + "rare zebra\n" + TRAIN, encoding="utf-8")
    size = 300 if request.param == "bpe" else 0
    return prepare(open_corpus(str(path)), Vocabulary(request.param, size, min_count=2)).tokenizer


ANY_TEXT = text(characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
PARTS = [
    "the",
    "cat",
    " ",
    "  ",
    "   ",
    "\n",
    "\t",
    "\r",
    "\xa0",
    "'s",
    ".",
    "é",
    "zebra",
    "\x1c",
    "\x85",
    "<eos>",
    "😀",
]
LIKELY = lists(sampled_from([*PARTS, "<unk>", "<eos>"])).map("".join)


@given(ANY_TEXT | LIKELY)
def test_ids_are_those_of_the_tokenizers_library(tokenizer: Tokenizer, sample: str) -> None:
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert tokenizer.encode(sample).tolist() == library.encode(sample).ids


@given(ANY_TEXT | LIKELY)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, sample: str) -> None:
    decoded = tokenizer.decode(tokenizer.encode(sample))
    if tokenizer.unit in ("byte", "bpe"):
        assert decoded == sample
    elif tokenizer.unit == "word" or tokenizer.unknown_id not in tokenizer.encode(sample):
        assert tokenizer.encode(decoded).tolist() == tokenizer.encode(sample).tolist()


@given(ANY_TEXT | LIKELY)
def test_characters_are_counted(tokenizer: Tokenizer, sample: str) -> None:
    ids = tokenizer.encode(sample)
    if tokenizer.unit == "word":
        words = [tokenizer.token(id) for id in ids.tolist()]
        assert tokenizer.characters(ids) == sum(len(word) + 1 for word in words if word != "<eos>")
    else:
        assert tokenizer.characters(ids) == len(sample)


def test_a_saved_tokenizer_loads_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    loaded = Tokenizer.load(path)
    assert (loaded.unit, loaded.vocabulary, loaded.unknown_id, loaded.start_id) == (
        tokenizer.unit,
        tokenizer.vocabulary,
        tokenizer.unknown_id,
        tokenizer.start_id,
    )
    assert loaded.encode(TRAIN).tolist() == tokenizer.encode(TRAIN).tolist()


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {"type": "Unigram", "vocab": []}}'])
def test_a_bad_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UnrolledError, match=r"tokenizer\.json is not a tokenizer of Unrolled"):
        Tokenizer.load(path)
    with pytest.raises(UnrolledError, match="is missing"):
        Tokenizer.load(tmp_path / "nowhere.json")


# ------------------------------------------------------------------------------------------------ the vocabulary


def learnt(write: Write, content: str, vocabulary: Vocabulary) -> Tokenizer:
    for split in ("valid", "test"):
        write(f"corpus/{split}.txt", "a b\n" if vocabulary.unknown else "a\n")
    return prepare(open_corpus(str(write("corpus/train.txt", content).parent)), vocabulary).tokenizer


def test_words_are_ordered_by_falling_count_then_alphabetically(write: Write) -> None:
    words = learnt(write, "b a c\nc b\na c\n", Vocabulary(unknown=False)).vocabulary
    assert words == ["<eos>", "c", "a", "b"]


def test_the_vocabulary_comes_from_train_alone(write: Write) -> None:
    assert "b" not in learnt(write, "a c\n", Vocabulary()).vocabulary


def test_rare_words_become_unknown_and_count_as_such(write: Write) -> None:
    tokenizer = learnt(write, "a a a b b x y z w\n", Vocabulary(min_count=2))
    assert tokenizer.vocabulary == ["<unk>", "a", "b", "<eos>"]
    assert tokenizer.decode(tokenizer.encode("a x b\n")) == "a <unk> b\n"


def test_a_limited_vocabulary_keeps_the_commonest_and_its_size(write: Write) -> None:
    tokenizer = learnt(write, "a a a a b b b c c d\n", Vocabulary(size=4))
    assert sorted(tokenizer.vocabulary) == ["<eos>", "<unk>", "a", "b"]
    characters = learnt(write, "aaaaabbbb cc d\n", Vocabulary("character", size=3))
    assert sorted(characters.vocabulary) == ["<unk>", "a", "b"]


@pytest.mark.parametrize(("unit", "thing"), [("word", "the word 'held'"), ("character", "the character 'h'")])
def test_without_unknown_what_is_not_in_the_vocabulary_is_named(write: Write, unit: Unit, thing: str) -> None:
    with pytest.raises(UnrolledError, match=f"{thing} is not in the model's vocabulary"):
        learnt(write, "a b\n", Vocabulary(unit, unknown=False)).encode("held")


def test_bpe_without_a_single_merge_is_loaded_as_what_it_is(write: Write, tmp_path: Path) -> None:
    tokenizer = learnt(write, "the cat\n", Vocabulary("bpe", min_count=1_000))
    path = write("tokenizer.json", tokenizer.to_json())
    assert Tokenizer.load(path).unit == "bpe"
    assert Tokenizer.load(path).encode("the").tolist() == tokenizer.encode("the").tolist()


def test_bpe_has_the_size_asked_for_and_nothing_unknown(write: Write) -> None:
    tokenizer = learnt(write, "low lower lowest " * 50 + "\n", Vocabulary("bpe", size=262))
    assert len(tokenizer) == 262
    assert tokenizer.unknown_id is None
    assert tokenizer.decode(tokenizer.encode("漢字 lowest\n")) == "漢字 lowest\n"


@pytest.mark.parametrize(
    ("size", "dtype"), [(1, "u1"), (256, "u1"), (257, "u2"), (65_536, "u2"), (65_537, "u4"), (200_000, "u4")]
)
def test_ids_take_the_smallest_type(size: int, dtype: str) -> None:
    assert smallest_dtype(size) == np.dtype(dtype)


# ------------------------------------------------------------------------------------------------ the cache


def test_a_second_start_reads_no_text(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = open_corpus(str(write("mine.txt", TRAIN)))
    first = prepare(corpus, Vocabulary())
    assert isinstance(first.ids["train"], np.memmap)

    def refuse(*arguments: object) -> None:
        raise AssertionError("the text was read again")

    monkeypatch.setattr(dataset_module, "read_text", refuse)
    monkeypatch.setattr(dataset_module, "learn", refuse)
    second = prepare(corpus, Vocabulary())
    assert second.key == first.key
    np.testing.assert_array_equal(first.ids["train"], second.ids["train"])
    third = find_prepared(first.key)
    assert third is not None
    assert third.tokenizer.vocabulary == first.tokenizer.vocabulary


@pytest.mark.parametrize("name", ["train.ids", "dataset.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff" * 7])
def test_a_damaged_cache_is_made_again(write: Write, name: str, content: bytes) -> None:
    corpus = open_corpus(str(write("mine.txt", TRAIN)))
    first = prepare(corpus, Vocabulary(min_count=3))
    ids = first.ids["train"].tolist()
    (dataset_module.cache_folder() / "ids" / first.key / name).write_bytes(content)
    assert prepare(corpus, Vocabulary(min_count=3)).ids["train"].tolist() == ids


def test_ids_that_were_changed_in_the_cache_are_made_again(write: Write) -> None:
    corpus = open_corpus(str(write("mine.txt", TRAIN)))
    first = prepare(corpus, Vocabulary())
    ids = first.ids["train"].tolist()
    path = dataset_module.cache_folder() / "ids" / first.key / "train.ids"
    path.write_bytes(bytes(path.stat().st_size))
    assert prepare(corpus, Vocabulary()).ids["train"].tolist() == ids


def test_bpe_takes_a_text_without_a_space(write: Write) -> None:
    content = "acgt" * 100_000
    prepared = prepare(open_corpus(str(write("dna.txt", content))), Vocabulary("bpe", 300))
    backend = tokenizers.Tokenizer.from_str(prepared.tokenizer.to_json())
    text = f"a {content[:5_000]}\u3000\n  {'é' * 700} {'x' * 256}y"
    assert prepared.tokenizer.encode(text).tolist() == backend.encode(text).ids
    assert prepared.tokenizer.decode(prepared.tokenizer.encode(text)) == text


def test_an_encoding_that_is_interrupted_leaves_nothing_wrong(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = prepare(open_corpus(str(write("mine.txt", TRAIN * 20))), Vocabulary("bpe", 300)).tokenizer
    expected = tokenizer.encode("a lowest newer wide\n").tolist()

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("unrolled.data.tokens.np.searchsorted", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokenizer.encode("other words than those\n")
    assert tokenizer.encode("a lowest newer wide\n").tolist() == expected
    assert tokenizer.decode(tokenizer.encode("other newer words\n")) == "other newer words\n"


def test_other_text_or_settings_are_prepared_anew(write: Write) -> None:
    keys = {
        prepare(open_corpus(str(write("mine.txt", content))), vocabulary).key
        for content in (TRAIN, TRAIN + "more\n")
        for vocabulary in (Vocabulary(), Vocabulary(min_count=2), Vocabulary("character"))
    }
    assert len(keys) == 6


def test_a_corpus_encoded_in_pieces_is_the_corpus_encoded_whole(tokenizer: Tokenizer, write: Write) -> None:
    content = TRAIN * 400  # several pieces
    corpus = open_text(str(write("long.txt", content)))
    assert corpus is not None
    np.testing.assert_array_equal(prepare_with(corpus, tokenizer).ids["text"], tokenizer.encode(content))


def test_several_threads_may_encode_at_once(write: Callable[[str, bytes | str], Path]) -> None:
    chance = random.Random(1)
    words = ["".join(chance.choices("abcdefghij", k=chance.randrange(1, 9))) for _ in range(3000)]
    corpus = open_corpus(str(write("text.txt", " ".join(words) + "\n")), "utf-8")
    tokenizer = prepare(corpus, Vocabulary("bpe", 300)).tokenizer
    texts = [" ".join(chance.choices(words, k=50)) for _ in range(60)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(tokenizer.encode, texts))
    for ids, encoded in zip(found, texts, strict=True):
        assert tokenizer.decode(ids.tolist()) == encoded


@pytest.mark.parametrize("run", [" " * 30_000, "\t\xa0" * 15_000, "x" * 30_000])
def test_pieces_of_bpe_are_never_learnt_longer_than_its_longest_word(run: str) -> None:
    backend = bpe_backend([f"the dog sees the cat{run}end\n"], 500, 1)
    assert max(len(piece) for piece in backend.get_vocab()) <= 2 * LONGEST_BPE_WORD  # of two bytes a character
