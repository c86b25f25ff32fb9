"""What is asked over HTTP is answered as from Python, whatever else is asked meanwhile."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
import torch
from hypothesis import given
from hypothesis.strategies import booleans
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient

import unrolled
from unrolled.inference.detokenize import detokenize
from unrolled.inference.embeddings import map_tokens
from unrolled.inference.reading import NOTHING, Unread
from unrolled.nn.model import LanguageModel
from unrolled.serving.app import make_app
from unrolled.serving.engine import _read, _Texts
from unrolled.serving.limits import Limits
from unrolled.serving.schema import GenerateRequest, PredictRequest, ScoreRequest, SessionRequest
from unrolled.serving.service import Service
from unrolled.serving.writing import Writing

TEXTS = ["the dog walks", "", "the dog sees a zebra", "a\nb\nthe dog", "  spaced   out  ", "the " * 300]


@contextmanager
def served(run: unrolled.Run, **options: Any) -> Iterator[TestClient]:
    with TestClient(make_app({"toy": run}, **options)) as client:
        yield client


def events(text: str) -> list[tuple[str, Any]]:
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((fields.get("event", ""), fields["data"]))
    return found


def test_scores_are_those_of_the_model(client: TestClient, toy_run: unrolled.Run) -> None:
    for options in ({}, {"begin": False}, {"end": False}, {"unknown": "skip"}, {"unknown": "spell"}):
        answer = client.post("/score", json={"texts": TEXTS, "per_token": True} | options).json()
        assert answer["model"] == "toy"
        for found, expected in zip(answer["scores"], toy_run.score_many(TEXTS, **options), strict=True):
            assert not isinstance(expected, unrolled.UnrolledError)
            assert found["log_prob"] == pytest.approx(expected.log_prob, abs=1e-4)
            assert (found["tokens"], found["unknown"]) == (expected.tokens, expected.unknown)
            assert [token["token"] for token in found["per_token"]] == [token for token, _ in expected.per_token]


def test_what_cannot_be_scored_is_said_in_its_place(client: TestClient) -> None:
    answer = client.post("/score", json={"model": "characters", "texts": ["a dog", "Ω", "a cat"]}).json()["scores"]
    assert answer[0]["log_prob"] < 0
    assert answer[2]["log_prob"] < 0
    assert "'Ω' is not in the model's vocabulary" in answer[1]["error"]
    assert answer[1]["log_prob"] is None


def test_a_whole_document_has_the_perplexity_of_evaluate(client: TestClient, toy_run: unrolled.Run) -> None:
    text = "the dog walks\na cat sees the dog\nthe cat\n" * 50
    path = toy_run.path.parent / "document.txt"
    path.write_text(text, encoding="utf-8")
    expected = toy_run.evaluate(data=str(path))
    score = client.post("/score", json={"texts": text, "begin": False, "per_token": True}).json()["scores"][0]
    assert score["tokens"] == expected["tokens"]
    assert score["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert -sum(token["log_prob"] for token in score["per_token"]) == pytest.approx(expected["nll_nats"], rel=1e-6)
    request = {"model": "toy", "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 0, "begin": False}
    logprobs = client.post("/v1/completions", json=request).json()["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert "".join(logprobs["tokens"]) == text
    assert -sum(logprobs["token_logprobs"][1:]) == pytest.approx(expected["nll_nats"], rel=1e-6)


def test_predictions_are_those_of_the_model(client: TestClient, toy_run: unrolled.Run) -> None:
    several: list[dict[str, Any]] = [{}, {"k": 3}, {"unknown": True}, {"complete": True}, {"k": 1000}]
    for options in several:
        answer = client.post("/predict", json={"prefixes": TEXTS} | options).json()["predictions"]
        for found, expected in zip(answer, toy_run.predict_many(TEXTS, **options), strict=True):
            assert [word["word"] for word in found["words"]] == [word for word, _ in expected.words]
            assert [word["probability"] for word in found["words"]] == pytest.approx([p for _, p in expected.words])
    (found,) = client.post("/predict", json={"prefixes": "the", "length": 3, "k": 2}).json()["predictions"]
    assert [word["word"] for word in found["words"]] == [text for text, _ in toy_run.continuations("the", 3, 2)]


def test_texts_are_those_of_the_model(client: TestClient, toy_run: unrolled.Run) -> None:
    several: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"top_k": 3, "stop": ["\n"]}, {"random_start": True}]
    for options in [*several, {"length": 0}]:
        request: dict[str, Any] = {"length": 30, "seed": 7} | options
        answer = client.post("/generate", json=request).json()
        assert answer["texts"][0]["text"] == toy_run.generate("", **request)
        assert answer["seed"] == 7
    answer = client.post("/generate", json={"prompt": "the dog", "samples": 3, "seed": 3, "length": 9}).json()
    assert [text["text"] for text in answer["texts"]] == toy_run.generate_many("the dog", 3, length=9, seed=3)
    assert [text["tokens"] for text in answer["texts"]] == [9] * 3
    again = client.post("/generate", json={"prompt": "the dog"}).json()
    assert again["texts"][0]["text"] == toy_run.generate("the dog", seed=again["seed"])


def test_a_stream_adds_up_to_the_text(client: TestClient, toy_run: unrolled.Run) -> None:
    request = {"prompt": "the", "samples": 2, "seed": 5, "length": 20, "stream": True}
    response = client.post("/generate", json=request)
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, (name, last) = events(response.text)
    texts = ["", ""]
    for _, data in pieces:
        piece = json.loads(data)
        texts[piece["index"]] += piece["text"]
    assert name == "done"
    assert [text["text"] for text in json.loads(last)["texts"]] == texts
    assert texts == toy_run.generate_many("the", 2, length=20, seed=5)


def test_a_session_reads_as_if_it_read_all_at_once(client: TestClient, toy_run: unrolled.Run) -> None:
    words = ["the", "dog", "sees", "a", "cat"]
    session = client.post("/sessions", json={"text": words[0]}).json()
    read = session["read"]
    for word in words[1:]:
        answer = client.post(f"/sessions/{session['session']}", json={"text": f" {word}"}).json()
        read += answer["read"]
    answer = client.get(f"/sessions/{session['session']}").json()
    assert answer["tokens"] == len(words)
    expected = toy_run.score(" ".join(words), end=False)
    assert [token["log_prob"] for token in read] == pytest.approx([p for _, p in expected.per_token], abs=1e-5)
    assert [word["word"] for word in answer["words"]] == [w for w, _ in toy_run.predict(" ".join(words)).words]
    completed = client.post(f"/sessions/{session['session']}", json={"typed": "d"}).json()
    expected_words = toy_run.predict(" ".join(words) + " d", complete=True).words
    assert [word["word"] for word in completed["words"]] == [word for word, _ in expected_words]
    wrong = client.post(f"/sessions/{session['session']}", json={"text": " that", "typed": "s t"})
    assert wrong.status_code == 422
    assert "holds no white space" in wrong.json()["error"]["message"]
    assert client.get(f"/sessions/{session['session']}").json()["tokens"] == len(words)


def test_a_fork_goes_its_own_way(client: TestClient, toy_run: unrolled.Run) -> None:
    first = client.post("/sessions", json={"text": "the dog"}).json()["session"]
    second = client.post(f"/sessions/{first}/fork").json()["session"]
    there = client.post(f"/sessions/{first}", json={"text": "walks"}).json()
    assert client.get(f"/sessions/{second}").json()["tokens"] == 2
    assert there["words"] != client.post(f"/sessions/{second}", json={"text": "sees"}).json()["words"]
    text = client.post("/generate", json={"session": second, "seed": 1, "length": 8}).json()["texts"][0]["text"]
    assert text == toy_run.generate("the dog sees", seed=1, length=8)
    assert client.delete(f"/sessions/{first}").status_code == 204
    assert client.get(f"/sessions/{first}").status_code == 404
    assert client.get(f"/sessions/{second}").status_code == 200


def test_embeddings_map_and_curves(client: TestClient, toy_run: unrolled.Run) -> None:
    request = {"words": ["dog", "zebra"], "k": 3, "vectors": True}
    found, unknown = client.post("/embeddings", json=request).json()["embeddings"]
    assert "'zebra' is not in the model's vocabulary" in unknown["error"]
    assert len(found["neighbours"]) == 3
    assert len(found["vector"]) == 32
    places = client.get("/models/toy/map?words=100").json()
    assert len(places["tokens"]) == len(places["places"]) == min(100, len(toy_run.tokenizer))
    epochs = client.get("/models/toy/curves").json()["epochs"]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    assert epochs[1]["valid_perplexity"] > 1
    assert [model["name"] for model in client.get("/models").json()["models"]] == ["toy", "characters"]


def test_many_at_once_get_the_answers_of_one_at_a_time(client: TestClient) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    for number in range(12):
        text = " ".join(["the dog walks a cat"] * (number * 7 % 11))
        asked += [
            ("/score", {"texts": [text, "the", text + " dog"], "model": ("toy", "characters")[number % 2]}),
            ("/predict", {"prefixes": [text, "a"]}),
            ("/generate", {"prompt": "the cat", "length": 5 + number, "seed": number, "samples": 1 + number % 3}),
            ("/v1/completions", {"model": "toy", "prompt": "a dog", "seed": number, "logprobs": 2, "echo": True}),
        ]

    def answer(request: tuple[str, dict[str, Any]]) -> Any:
        answer = client.post(request[0], json=request[1]).json()
        return {key: value for key, value in answer.items() if key not in ("id", "created")}

    alone = list(map(answer, asked))
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(answer, asked))
    for one, other in zip(_flat(alone), _flat(together), strict=True):
        assert one == (pytest.approx(other, rel=1e-5, abs=1e-4) if isinstance(other, float) else other)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = [part for pair in sorted(value.items()) for part in pair]
    if isinstance(value, list):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def test_requests_that_wait_together_go_through_the_model_together(
    toy_run: unrolled.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, batches = LanguageModel.hidden, list[int]()
    prefixes = [f"the {word}" for word in ("dog", "cat", "girl", "birds")] * 4

    def counted(self: LanguageModel, inputs: torch.Tensor, states: Any) -> Any:
        batches.append(inputs.shape[1])
        return original(self, inputs, states)

    async def ask() -> list[Any]:
        service, goes_on = Service({"toy": toy_run}, Limits()), threading.Event()
        busy = asyncio.ensure_future(service.engine.last(iter(goes_on.wait, True)))
        asked = [asyncio.ensure_future(service.predict(PredictRequest(prefixes=prefix))) for prefix in prefixes]
        await asyncio.sleep(0)  # each has run to where it waits for the engine
        goes_on.set()
        answers = await asyncio.gather(*asked)
        await busy
        service.close()
        return [pair.word for answer in answers for pair in answer.predictions[0].words]

    alone = [word for prefix in prefixes for word, _ in toy_run.predict(prefix).words]
    monkeypatch.setattr(LanguageModel, "hidden", counted)
    assert asyncio.run(ask()) == alone
    assert batches == [16]


def test_a_request_of_no_texts_is_answered_beside_others(toy_run: unrolled.Run) -> None:
    jobs = [_Texts(toy_run, texts, None) for texts in ([], [Unread(np.arange(3), NOTHING, follows=True)], [])]
    assert list(_read(jobs))
    assert [len(job.future.result(0)) for job in jobs] == [0, 1, 0]


def test_of_a_text_that_nothing_follows_no_state_is_kept(toy_run: unrolled.Run) -> None:
    job = _Texts(toy_run, [Unread(np.arange(3), np.arange(3)), Unread(np.arange(3), NOTHING, follows=True)], None)
    assert list(_read([job]))
    scored, followed = job.future.result(0)
    assert (scored.states, scored.log_probs) == ((), None)
    assert [len(state) for state in followed.states] == [2, 2]


def test_a_text_that_cannot_be_drawn_ends_no_other(toy_run: unrolled.Run) -> None:
    async def write() -> tuple[int | BaseException, int | BaseException]:
        service = Service({"toy": toy_run}, Limits())
        good, bad = [await service.generate(GenerateRequest(length=20, seed=1)) for _ in range(2)]
        bad._log_probs = torch.full((1, len(toy_run.tokenizer)), torch.nan)

        async def all_of(writing: Writing) -> int:
            return len([piece async for piece in writing])

        counts = await asyncio.gather(all_of(good), all_of(bad), return_exceptions=True)
        service.close()
        return counts

    count, error = asyncio.run(write())
    assert count == 20
    assert isinstance(error, RuntimeError)


def test_who_encodes_a_long_text_stops_nobody_else(toy_run: unrolled.Run) -> None:
    async def ask() -> list[str]:
        service, done = Service({"toy": toy_run}, Limits()), list[str]()

        session = (await service.begin(SessionRequest(text="the"))).session

        async def predict() -> None:
            await service.predict(PredictRequest(prefixes="the"))
            done.append("predicted")

        with toy_run.tokenizer._encoding:  # as a thread has it that encodes megabytes
            waiting = asyncio.ensure_future(predict())
            for _ in range(3):
                await asyncio.to_thread(service.models)
            assert service.standing(session).words
            done.append("others")
        await waiting
        service.close()
        return done

    assert asyncio.run(ask()) == ["others", "predicted"]


def test_many_predictions_are_made_a_portion_at_a_time(
    client: TestClient, toy_run: unrolled.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = {"prefixes": [f"the {word}" for word in ("dog", "cat", "girl", "birds", "old")], "k": 3}
    for length in (1, 2):
        whole = client.post("/predict", json=request | {"length": length}).json()
        with monkeypatch.context() as few:
            few.setattr("unrolled.serving.service._MOST_FIGURES", 2 * len(toy_run.tokenizer))
            parts = client.post("/predict", json=request | {"length": length}).json()
            many = {"prefixes": ["the " * 80_000] * 3, "k": 1, "length": length}
            assert "240,003 tokens are more than" in client.post("/predict", json=many).json()["error"]["message"]
        assert [[word["word"] for word in one["words"]] for one in parts["predictions"]] == [
            [word["word"] for word in one["words"]] for one in whole["predictions"]
        ]


def test_one_who_goes_away_takes_no_map_from_others(toy_run: unrolled.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()

    def late(*arguments: Any) -> Any:
        assert goes_on.wait(60)
        return map_tokens(*arguments)

    async def ask() -> tuple[int, int]:
        service = Service({"toy": toy_run}, Limits())
        first, second = (asyncio.ensure_future(service.map("toy", 20)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        goes_on.set()
        sizes = len((await second).tokens), len((await service.map("toy", 20)).tokens)
        service.close()
        return sizes

    monkeypatch.setattr("unrolled.serving.service.map_tokens", late)
    assert asyncio.run(ask()) == (20, 20)


def test_a_map_that_failed_is_tried_again(toy_run: unrolled.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> int:
        service = Service({"toy": toy_run}, Limits())
        with monkeypatch.context() as broken:
            broken.setattr("unrolled.serving.service.map_tokens", lambda *arguments: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await service.map("toy", 20)
        tokens = (await service.map("toy", 20)).tokens
        service.close()
        return len(tokens)

    assert asyncio.run(ask()) == 20


def test_a_long_request_does_not_stop_a_short_one(toy_run: unrolled.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> list[str]:
        service, goes_on, done = Service({"toy": toy_run}, Limits()), threading.Event(), list[str]()

        async def score() -> None:
            await service.score(ScoreRequest(texts="the dog walks\n" * 1_400))
            done.append("long")

        async def write() -> None:
            async for _ in await service.generate(GenerateRequest(length=10, seed=1)):
                pass
            done.append("written")

        async def predict() -> None:
            await service.predict(PredictRequest(prefixes="the"))
            done.append("short")

        busy = asyncio.ensure_future(service.engine.last(iter(goes_on.wait, True)))
        asked = [asyncio.ensure_future(one()) for one in (score, write, predict)]
        await asyncio.sleep(0)  # each has run to where it waits for the engine
        goes_on.set()
        await asyncio.gather(busy, *asked)
        service.close()
        return done

    monkeypatch.setattr("unrolled.inference.reading._TOKENS_AT_ONCE", 4)  # so that the long one takes 1,400 rounds
    done = asyncio.run(ask())
    assert sorted(done) == ["long", "short", "written"]
    assert done[-1] == "long"


def test_a_text_is_never_far_ahead_of_whoever_listens(toy_run: unrolled.Run) -> None:
    async def listen() -> int:
        service = Service({"toy": toy_run}, Limits())
        writing = await service.generate(GenerateRequest(length=1000))
        pieces = aiter(writing)
        await anext(pieces)
        for _ in range(100):  # rounds of the engine in which it could go on
            await service.predict(PredictRequest(prefixes="the"))
        drawn = sum(writing.drawing.tokens)
        rest = [piece async for piece in pieces]
        service.close()
        assert len(rest) == 999
        return drawn

    assert 1 <= asyncio.run(listen()) <= 17


def test_a_stop_that_may_have_begun_holds_text_back_but_no_token(client: TestClient) -> None:
    request = {"model": "toy", "prompt": "the dog", "seed": 3, "max_tokens": 12, "logprobs": 1}
    plain = client.post("/v1/completions", json=request).json()["choices"][0]
    stop = plain["text"][4:20] + "QQ"
    held = client.post("/v1/completions", json=request | {"stop": stop}).json()["choices"][0]
    assert held == plain


def test_parts_of_characters_are_named_by_their_bytes(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "text").write_text("съешь ещё этих мягких булок\n" * 200)
    small = {"data.tokens": "byte", "training.max_epochs": 1, "model.embedding_size": 8, "model.hidden_sizes": "8"}
    run = unrolled.train("demo", data=tmp_path / "text", out=tmp_path / "run", changes=small)
    with served(run) as client:
        request = {"model": "toy", "prompt": "с", "max_tokens": 4, "logprobs": 20}
        found = client.post("/v1/completions", json=request).json()["choices"][0]["logprobs"]["top_logprobs"]
    assert [len(top) for top in found] == [20] * 4
    assert "bytes:\\xd0" in found[0]
    assert not any("\ufffd" in name for top in found for name in top)


def test_detokenized_streams_are_the_detokenized_text(client: TestClient, toy_run: unrolled.Run) -> None:
    request = {"prompt": "the", "seed": 5, "length": 40, "stream": True, "detokenize": True}
    *pieces, (_, last) = events(client.post("/generate", json=request).text)
    text = json.loads(last)["texts"][0]["text"]
    assert "".join(json.loads(data)["text"] for _, data in pieces) == text
    assert text == detokenize(toy_run.generate("the", seed=5, length=40))


PROBLEMS: list[tuple[str, dict[str, Any] | str, int, str]] = [
    ("/score", "{", 400, "JSON"),
    ("/score", {}, 422, "texts: Field required"),
    ("/score", {"texts": "a", "model": "tody"}, 404, "no model 'tody'; did you mean 'toy'?"),
    ("/score", {"texts": "a", "unknown": "x"}, 422, "unknown: Input should be 'count', 'skip' or 'spell'"),
    ("/score", {"texts": ["the " * 150_000] * 2}, 422, "tokens are more than 200,000"),
    ("/predict", {"k": 0}, 422, "k: Input should be greater than or equal to 1"),
    ("/predict", {"model": "characters", "complete": True}, 422, "only a model of words completes them"),
    ("/predict", {"prefixes": "the", "prefix": "a"}, 422, "prefix: Extra inputs are not permitted"),
    ("/generate", {"samples": 65}, 422, "65 samples are more than 64"),
    ("/generate", {"banned": ["zebra"]}, 422, "'zebra' is not in the model's vocabulary"),
    ("/generate", {"length": 50_000, "samples": 8}, 422, "400,000 tokens are more than 200,000"),
    ("/generate", {"session": "x"}, 404, "no such session"),
    ("/generate", {"prompt": "a", "random_start": True}, 422, "exclude each other"),
    ("/generate", {"stop": ["x" * 301]}, 422, "String should have at most 300 characters"),
    ("/generate", {"prompt": "a " * 300_000}, 422, "300,001 tokens are more than 200,000"),
    ("/predict", {"prefixes": ["the \ud800"], "complete": True}, 422, "not UTF-8"),
    ("/predict", {"prefixes": [""] * 300, "k": 1000}, 422, "300,000 words of an answer are more than 200,000"),
    ("/predict", {"length": 2, "k": 201}, 422, "k must be at most 200, not 201"),
    ("/v1/completions", {"model": "toy", "prompt": ["the"] * 33, "n": 2}, 422, "66 samples are more than 64"),
    (
        "/v1/completions",
        {"model": "toy", "prompt": "the " * 10_000, "max_tokens": 0, "echo": True, "logprobs": 20},
        422,
        "210,000 log-probabilities of an answer are more than 200,000",
    ),
    ("/sessions/x", {"text": "a"}, 404, "no such session"),
    ("/v1/completions", {"model": "x"}, 404, "no model 'x'"),
    ("/v1/completions", {"model": "toy", "suffix": "x"}, 422, "suffix is not supported"),
    ("/v1/completions", {"model": "toy", "best_of": 3}, 422, "best_of is not supported beyond n"),
    ("/v1/completions", {"model": "toy", "begin": False}, 422, "an empty prompt has to begin a line"),
    ("/nowhere", {}, 404, "Not Found"),
]


@pytest.mark.parametrize(("path", "request_body", "status", "message"), PROBLEMS)
def test_a_mistake_is_one_line_that_names_it(
    client: TestClient, path: str, request_body: dict[str, Any] | str, status: int, message: str
) -> None:
    content = request_body if isinstance(request_body, str) else json.dumps(request_body)
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    error = response.json()["error"]
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_request_that_does_not_say_that_it_is_json_is_told_to(client: TestClient) -> None:
    response = client.post("/predict", content=b'{"prefixes": "the"}')
    assert response.status_code == 422
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_a_request_of_too_many_bytes_is_refused_however_it_comes(toy_run: unrolled.Run) -> None:
    with served(toy_run, limits=Limits(body_bytes=1000)) as client:
        body = json.dumps({"texts": "a" * 2000}).encode()

        def pieces() -> Iterator[bytes]:
            for first in range(0, len(body), 100):
                yield body[first : first + 100]

        senders: list[Callable[[], bytes | Iterator[bytes]]] = [lambda: body, pieces]
        for content in senders:
            response = client.post("/score", content=content(), headers={"content-type": "application/json"})
            assert response.status_code == 413
            assert response.json()["error"]["type"] == "invalid_request_error"
        assert client.post("/score", json={"texts": "a"}).status_code == 200


def test_a_request_that_takes_too_long_is_given_up(toy_run: unrolled.Run) -> None:
    with served(toy_run, limits=Limits(seconds=0.05)) as client:
        response = client.post("/generate", json={"length": 100_000})
        assert response.status_code == 408
        assert "not done within 0.05 s" in response.json()["error"]["message"]
        assert response.headers["x-should-retry"] == "false"
        streamed = events(client.post("/generate", json={"length": 100_000, "stream": True}).text)
        assert streamed[-1][0] == "error"
        assert "not done within 0.05 s" in streamed[-1][1]
        assert client.get("/healthz").status_code == 200


def test_more_requests_than_allowed_are_turned_away(toy_run: unrolled.Run) -> None:
    with served(toy_run, limits=Limits(requests=1)) as client, ThreadPoolExecutor(8) as pool:
        ask = lambda _: client.post("/generate", json={"length": 500}).status_code  # noqa: E731
        statuses = list(pool.map(ask, range(8)))
        assert set(statuses) == {200, 429}
        assert client.post("/generate", json={"length": 5}).status_code == 200


def test_without_the_token_nothing_is_told(toy_run: unrolled.Run) -> None:
    with served(toy_run, token="secret é") as client:
        for path in ("/models", "/metrics", "/models/toy/map", "/nowhere"):
            assert client.get(path).status_code == 401
        for wrong in ("secret", "Bearer secret", "bearer secret é", "Bearer secret é x"):
            response = client.post("/score", json={"texts": "a"}, headers={b"Authorization": wrong.encode()})
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
        right = {b"Authorization": "Bearer secret é".encode()}
        assert client.post("/score", json={"texts": "a"}, headers=right).status_code == 200
        for path in ("/", "/page.js", "/page.css", "/healthz", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200


def test_what_is_counted_is_what_was_asked(toy_run: unrolled.Run) -> None:
    with served(toy_run) as client:
        client.post("/predict", json={"prefixes": ["the dog", "a"]})
        client.post("/generate", json={"length": 6, "samples": 2})
        client.post("/sessions", json={})
        client.get("/models/x/map")
        client.request("X0", "/models")
        lines = client.get("/metrics").text.splitlines()
    assert 'unrolled_requests_total{method="POST",path="/predict",status="200"} 1.0' in lines
    assert 'unrolled_requests_total{method="GET",path="/models/{name}/map",status="404"} 1.0' in lines
    assert not any("X0" in line for line in lines)
    assert {"unrolled_tokens_drawn 12.0", "unrolled_tokens_read 7.0", "unrolled_sessions 1.0"} <= set(lines)


def test_docs_and_page_name_no_address_but_this_server(client: TestClient) -> None:
    for path in ("/", "/page.js", "/page.css", "/docs"):
        text = client.get(path).text
        assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "script-src 'self'" in client.get("/").headers["content-security-policy"]


def test_the_server_keeps_to_its_own_description(client: TestClient) -> None:
    tried = 0
    for found in schemathesis.openapi.from_asgi("/openapi.json", client.app).get_all_operations():
        assert isinstance(found, Ok)

        @given(case=found.ok().as_strategy(), of_one_there_is=booleans())
        def keeps_to_it(case: schemathesis.Case, of_one_there_is: bool) -> None:
            if of_one_there_is and "name" in case.path_parameters:
                case.path_parameters["name"] = "toy"
            case.call_and_validate(excluded_checks=[positive_data_acceptance])  # what fields may not say together

        keeps_to_it()
        tried += 1
    assert tried == 17
