"""`unrolled serve` as a process: with OpenAI's own client, with signals, and with a user's mistakes."""

import json
import signal
import socket
import threading
from pathlib import Path

import httpx2
import openai
import pytest
from serving.conftest import server

import unrolled
from unrolled.cli import main
from unrolled.serving.server import listen


@pytest.fixture
def api(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_openais_client_completes(api: openai.OpenAI, toy_run: unrolled.Run) -> None:
    found = api.completions.create(model="toy", prompt="the dog", max_tokens=12, seed=4, n=2)
    texts = [choice.text for choice in found.choices]
    assert texts == toy_run.generate_many("the dog", 2, length=12, seed=4)
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (2, 24)
    assert [choice.finish_reason for choice in found.choices] == ["length", "length"]
    assert [model.id for model in api.models.list()] == ["toy", "characters"]


def test_openais_client_streams(api: openai.OpenAI, toy_run: unrolled.Run) -> None:
    pieces = list(
        api.completions.create(
            model="toy", prompt="a cat", max_tokens=30, seed=1, stop="\n", stream=True, logprobs=1, temperature=1.0
        )
    )
    text = "".join(piece.choices[0].text for piece in pieces)
    assert text == toy_run.generate("a cat", length=30, seed=1, stop=("\n",))
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_openais_client_scores_with_echo(api: openai.OpenAI, toy_run: unrolled.Run) -> None:
    text = "the dog walks\na cat sees a zebra"
    found = api.completions.create(model="toy", prompt=[text, "the"], max_tokens=0, echo=True, logprobs=3)
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    expected = toy_run.score(text, end=False)
    assert logprobs.token_logprobs == pytest.approx([value for _, value in expected.per_token], abs=1e-4)
    assert "".join(logprobs.tokens) == text == found.choices[0].text
    ends = [*logprobs.text_offset[1:], len(text)]
    assert [text[a:b] for a, b in zip(logprobs.text_offset, ends, strict=True)] == logprobs.tokens
    assert logprobs.top_logprobs is not None
    best = toy_run.predict("the dog", 3, unknown=True).words
    assert logprobs.tokens[0] in logprobs.top_logprobs[0]
    assert api.models.retrieve("toy").id == "toy"
    assert list(logprobs.top_logprobs[2]) == [" " + word if word != "<eos>" else "\n" for word, _ in best]
    with pytest.raises(openai.NotFoundError, match="no model 'toi'; did you mean 'toy'"):
        api.completions.create(model="toi", prompt="the")


def test_characters_complete_too(api: openai.OpenAI, character_run: unrolled.Run) -> None:
    found = api.completions.create(model="characters", prompt="the d", max_tokens=8, seed=2, echo=True, logprobs=2)
    assert found.choices[0].text == "the d" + character_run.generate("the d", length=8, seed=2)
    assert found.choices[0].logprobs is not None
    assert found.choices[0].logprobs.tokens == list(found.choices[0].text)


def test_what_openais_client_may_leave_open_is_taken(api: openai.OpenAI, toy_run: unrolled.Run) -> None:
    found = api.completions.create(model="toy", prompt=None, max_tokens=12, top_p=0, seed=1)
    assert found.choices[0].text == toy_run.generate(length=12, temperature=0)


def test_a_drawn_token_is_named_as_it_stands_there(api: openai.OpenAI) -> None:
    for prompt in ("the dog", "the dog\n", "the dog\n  ", "  ", ""):
        found = api.completions.create(model="toy", prompt=prompt, max_tokens=9, top_p=0, logprobs=2)
        logprobs = found.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert logprobs.top_logprobs is not None
        assert all(token in top for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True))


def test_who_does_not_take_a_large_answer_loses_it(toy_run: unrolled.Run) -> None:
    body = json.dumps({"texts": "the dog " * 50_000, "per_token": True}).encode()
    fields = (
        "POST /score HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    head = "\r\n".join((*fields, "", ""))
    with server(toy_run.path, "--most-seconds", 6) as (_, address), socket.socket() as connection:
        answer = httpx2.post(f"{address}/score", content=body, headers={"Content-Type": "application/json"})
        assert len(answer.json()["scores"][0]["per_token"]) == 100_001
        assert len(answer.content) == int(answer.headers["Content-Length"])
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        connection.connect(("127.0.0.1", int(address.rsplit(":", 1)[1])))
        connection.sendall(head.encode() + body)
        counted = (httpx2.get(f"{address}/metrics").text for _ in range(20_000))
        assert any('unrolled_request_seconds_count{path="/score"} 2.0' in text for text in counted)
        taken = 0
        while part := connection.recv(1 << 16):
            taken += len(part)
    assert taken < len(answer.content)


def test_it_ends_when_it_is_told_to_and_what_is_under_way_ends_first(toy_run: unrolled.Run) -> None:
    request = {"length": 400, "stream": True}
    with server(toy_run.path) as (process, address):
        with httpx2.stream("POST", f"{address}/generate", json=request) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-2:]
        assert process.wait(30) == 0
    assert last[0] == "event: done"
    assert json.loads(last[1].removeprefix("data: "))["texts"][0]["tokens"] == 400


def test_a_listener_that_goes_away_stops_its_text_and_nobody_elses(toy_run: unrolled.Run) -> None:
    with server(toy_run.path) as (process, address):
        with httpx2.stream("POST", f"{address}/generate", json={"length": 100_000, "stream": True}) as response:
            next(response.iter_lines())
        texts: list[str] = []

        def ask() -> None:
            answer = httpx2.post(f"{address}/generate", json={"length": 20, "seed": 1}).json()
            texts.append(answer["texts"][0]["text"])

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts == [toy_run.generate(length=20, seed=1)] * 4
    assert process.returncode == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_it_listens_so_that_small_answers_are_sent_at_once(host: str) -> None:
    """asyncio sets TCP_NODELAY where the socket says that it is TCP, and only there."""
    try:
        listening = listen(host, 0)
    except OSError:
        pytest.skip(f"nothing can listen at {host} here")
    with listening:
        assert listening.proto == socket.IPPROTO_TCP


def test_another_sites_name_does_not_lead_here(address: str) -> None:
    assert httpx2.get(f"{address}/models", headers={"Host": "evil.example"}).status_code == 400


def test_a_form_from_another_site_asks_nothing(address: str) -> None:
    body = json.dumps({"texts": "the"})
    response = httpx2.post(f"{address}/score", content=body, headers={"Content-Type": "text/plain"})
    assert response.status_code == 422


def test_a_users_mistake_is_one_line(toy_run: unrolled.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        mistakes = {
            (): "wants one or more run folders",
            (tmp_path / "nowhere",): "nowhere",
            (toy_run.path, "--port", port): f"cannot listen at 127.0.0.1, port {port}: Address already in use",
            (toy_run.path, "--port", 70_000): "--port must be from 0 to 65535, not 70000",
            (toy_run.path, "--host", "no.such.host.invalid"): "cannot listen at no.such.host.invalid",
            (toy_run.path, toy_run.path): "two of the folders are named 'toy'",
            (toy_run.path, "--threads", "-1"): "--threads must be at least 0, not -1",
            (toy_run.path, "--most-seconds", "nan"): "--most-seconds must be more than 0, not nan",
        }
        for arguments, message in mistakes.items():
            with pytest.raises(SystemExit) as ended:
                main(["serve", *map(str, arguments)])
            error = capsys.readouterr().err
            assert (ended.value.code, error.count("\n")) == (2, 1), error
            assert message in error


def test_a_token_and_limits_on_the_command_line_are_the_servers(toy_run: unrolled.Run) -> None:
    with server(toy_run.path, "--token", "secret", "--most-sessions", 1) as (_, address):
        assert httpx2.get(f"{address}/models").status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert httpx2.get(f"{address}/models", headers=headers).status_code == 200
        first, second = (httpx2.post(f"{address}/sessions", json={}, headers=headers).json() for _ in range(2))
        found = [httpx2.get(f"{address}/sessions/{one['session']}", headers=headers) for one in (first, second)]
        assert [answer.status_code for answer in found] == [404, 200]
