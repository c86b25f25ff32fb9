"""A session says what `predict` says of the whole text, however the text came to it."""

import pytest
import torch

import unrolled
from unrolled.errors import UnrolledError
from unrolled.inference.generate import Prediction
from unrolled.inference.reading import Reading
from unrolled.kernels import build
from unrolled.nn.stream import Stream

PIECES = ["", " the", " old dog", " ", "that sees the cats\n", "the girl " * 30, "zebra", " walks"]


def same(one: Prediction, other: Prediction) -> bool:
    return one.prefix == other.prefix and dict(one.words) == pytest.approx(dict(other.words), abs=1e-4)


@pytest.mark.parametrize("kernels", [True, False])
def test_what_grows_is_as_what_is_whole(toy_run: unrolled.Run, kernels: bool) -> None:
    def check() -> None:
        session = toy_run.session("birds")
        for number, piece in enumerate(PIECES):
            session.read(piece)
            if number % 3 != 1:
                assert same(session.predict(5), toy_run.predict(session.text, 5))
        assert session.text == "birds" + "".join(PIECES)

    if kernels:
        check()
    else:
        with build.switched_off():
            check()


def test_a_stream_on_pytorch_alone_keeps_no_history(toy_run: unrolled.Run) -> None:
    with build.switched_off():
        stream = Stream(toy_run.model, toy_run.model.initial_state(1))
        stream.likeliest(torch.tensor([3]), 5)
    assert not any(part.requires_grad for state in stream.states for part in state)


def test_more_than_one_thing_may_be_asked_of_a_place(toy_run: unrolled.Run) -> None:
    session, size = toy_run.session("the dog"), len(toy_run.tokenizer)
    for k, unknown in ((3, False), (1, False), (7, True), (10 * size, True), (2, False)):
        assert same(session.predict(k, unknown), toy_run.predict("the dog", k, unknown))
    session.read(" that")
    with pytest.raises(UnrolledError, match="holds no white space"):
        session.predict(4, typed="sees t")
    for typed in ("s", "se", "w"):
        found = session.predict(4, typed=typed)
        expected = toy_run.predict(f"the dog that {typed}", 4, complete=True)
        assert found.prefix == expected.prefix
        assert [word for word, _ in found.words] == [word for word, _ in expected.words]
        assert [value for _, value in found.words] == pytest.approx([value for _, value in expected.words], abs=1e-3)
    assert same(session.predict(5), toy_run.predict("the dog that", 5))
    session.read(" sees")
    assert same(session.predict(5), toy_run.predict("the dog that sees", 5))


def test_broken_off_nothing_is_read(toy_run: unrolled.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for more in (" dog that sees", " girl" * 40):
        session = toy_run.session("the")
        session.predict(5)
        session.read(more)
        with monkeypatch.context() as broken:
            for of in (Stream, Reading):
                broken.setattr(of, "read" if of is Stream else "finish", broken_off)
            with pytest.raises(KeyboardInterrupt):
                session.predict(5)
        assert same(session.predict(5), toy_run.predict(session.text, 5))


def broken_off(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_of_characters_too_and_what_is_unknown_to_them_is_refused(character_run: unrolled.Run) -> None:
    session = character_run.session("the do")
    with pytest.raises(UnrolledError, match="not in the model's vocabulary"):
        session.read("g€")
    session.read("g")
    assert same(session.predict(5), character_run.predict("the dog", 5))
    with pytest.raises(UnrolledError, match="only a model of words completes them"):
        session.predict(5, typed="w")
    with pytest.raises(UnrolledError, match="k must be at least 1"):
        session.predict(0)


@pytest.mark.parametrize("asked_before", [True, False])
def test_an_answer_that_fails_leaves_the_last_token_to_be_read(
    toy_run: unrolled.Run, monkeypatch: pytest.MonkeyPatch, asked_before: bool
) -> None:
    def full(*arguments: object) -> None:
        raise MemoryError

    session = toy_run.session("the dog")
    if asked_before:
        session.predict(1)
    for name, ask in (("likeliest", lambda: session.predict(5)), ("read", lambda: session.predict(5, typed="s"))):
        with monkeypatch.context() as broken:
            broken.setattr(Stream, name, full)
            with pytest.raises(MemoryError):
                ask()
    session.read(" that")
    assert same(session.predict(5), toy_run.predict("the dog that", 5))
