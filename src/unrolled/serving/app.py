"""The routes: each takes a request, asks the service, and answers; and the page."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any, Literal

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from fastapi.routing import APIRoute, APIRouter
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

import unrolled
from unrolled.errors import UnrolledError
from unrolled.run import Run
from unrolled.serving import schema
from unrolled.serving.completions import Completion, CompletionRequest, complete
from unrolled.serving.guard import Guard, Metrics, describe, problem
from unrolled.serving.limits import Limits, Refused
from unrolled.serving.service import Service
from unrolled.serving.writing import Writing

_PATIENCE_S = 0.5
"""Between looks whether whoever asked is still there."""
_LARGE = 2_000
"""Figures."""
_PART = 1 << 16
"""Bytes of an answer that are sent before somebody has to take them."""
_NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients would ask twice more for what took too long."""
_PAGE = resources.files("unrolled.serving") / "page"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(
    runs: dict[str, Run],
    limits: Limits = Limits(),  # noqa: B008
    token: str | None = None,
    threads: int = 1,
    hosts: tuple[str, ...] = ("*",),
) -> FastAPI:
    """The server as an ASGI application.

    Args:
        runs: opened run folders by name; the first answers where a request names none.
        limits: of requests.
        token: that requests have to bear; None for none.
        threads: that computing may use.
        hosts: names that this server goes by; ("*",) for any.
    """
    service = Service(runs, limits, threads)
    metrics = Metrics(service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPIOffline(
        title="Unrolled",
        version=unrolled.__version__,
        description="How probable is a text, what comes next, and more of it.",
        lifespan=lifespan,
        dependencies=[Security(HTTPBearer(auto_error=False))] if token else [],
        responses={
            status: about | {"model": schema.Problem}
            for status, about in describe(400, 401, 408, 413, 422, 429).items()
        },
    )
    app.include_router(_routes(service, metrics))
    _page(app)
    app.add_exception_handler(UnrolledError, _unrolled_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(
        TimeoutError, lambda request, error: problem(408, f"not done within {limits.seconds:g} s", headers=_NO_RETRY)
    )
    app.add_exception_handler(Exception, lambda request, error: problem(500, "an internal error; the log has it"))
    app.add_middleware(Guard, metrics, token, limits.requests, limits.body_bytes, limits.seconds)
    if hosts != ("*",):
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    return app


def _routes(service: Service, metrics: Metrics) -> APIRouter:
    seconds = service.limits.seconds

    class Timed(APIRoute):
        """Gives a request up after so many seconds, or when whoever asked has gone."""

        def get_route_handler(self) -> Callable[[Request], Any]:
            handle = super().get_route_handler()

            async def timed(request: Request) -> Response:
                async with asyncio.timeout(seconds):
                    await request.body()
                    work = asyncio.create_task(handle(request))
                    try:
                        while not (await asyncio.wait({work}, timeout=_PATIENCE_S))[0]:
                            if await request.is_disconnected():
                                break
                        return await work if work.done() else Response(status_code=499)
                    finally:
                        work.cancel()

            return timed

    routes = APIRouter(route_class=Timed)
    missing: dict[int | str, dict[str, Any]] = {404: describe(404)[404] | {"model": schema.Problem}}

    @routes.post("/score", responses=missing)
    async def score(request: schema.ScoreRequest) -> schema.ScoreAnswer:
        """How probable texts are."""
        return await _ready(await service.score(request))

    @routes.post("/predict", responses=missing)
    async def predict(request: schema.PredictRequest) -> schema.PredictAnswer:
        """The likeliest next tokens after texts."""
        return await _ready(await service.predict(request))

    @routes.post("/generate", responses=missing | _events("pieces of text, then the answer"))
    async def generate(request: schema.GenerateRequest) -> schema.GenerateAnswer:
        """A text continued: at once, or with `stream` as server-sent events.

        Each event's data is `{"index", "text"}`; the last event is `done` with the answer, or `error` with the problem.
        """
        writing = await service.generate(request)
        if request.stream:
            return _streamed(_written(writing), seconds)
        async for _ in writing:
            pass
        return await _ready(writing.answer())

    @routes.post("/embeddings", responses=missing)
    async def embeddings(request: schema.EmbeddingsRequest) -> schema.EmbeddingsAnswer:
        """The tokens nearest to given ones."""
        return await _ready(await service.embeddings(request))

    @routes.post("/sessions", responses=missing, status_code=201)
    async def begin(request: schema.SessionRequest) -> schema.SessionAnswer:
        """Begins a text that will grow; the server keeps its state."""
        return await _ready(await service.begin(request), 201)

    @routes.get("/sessions/{id}", responses=missing)
    async def standing(id: str) -> schema.SessionAnswer:
        """Where a session stands, and what comes next."""
        return service.standing(id)

    @routes.post("/sessions/{id}", responses=missing)
    async def go_on(id: str, request: schema.ReadRequest) -> schema.SessionAnswer:
        """More of the text: one step for each token, however long the text."""
        return await _ready(await service.go_on(id, request))

    @routes.post("/sessions/{id}/fork", responses=missing, status_code=201)
    async def fork(id: str) -> schema.SessionAnswer:
        """A second session that stands where the first stands."""
        return service.fork(id)

    @routes.delete("/sessions/{id}", responses=missing, status_code=204)
    async def end(id: str) -> None:
        """Forgets a session."""
        service.session(id)
        service.sessions.end(id)

    @routes.get("/models")
    async def models() -> schema.ModelsAnswer:
        """The models that answer here."""
        return service.models()

    @routes.get("/models/{name}/map", responses=missing)
    async def map(name: str, words: Literal["100", "300", "1000"] = "300") -> schema.MapAnswer:
        """The commonest tokens on a map; the first time it takes some seconds."""
        return await service.map(name, int(words))

    @routes.get("/models/{name}/curves", responses=missing)
    async def curves(name: str) -> schema.CurvesAnswer:
        """How the training went, epoch by epoch."""
        return service.curves(name)

    @routes.post("/v1/completions", responses=missing | _events("pieces of the completion"))
    async def completions(request: CompletionRequest) -> Completion:
        """A completion by OpenAI's protocol."""
        completing = await complete(service, request)
        if request.stream:
            return _streamed(completing.pieces(), seconds)
        return await _ready(await completing.whole())

    @routes.get("/v1/models")
    async def openai_models() -> dict[str, Any]:
        """The models by OpenAI's protocol."""
        return {"object": "list", "data": [_openai_model(name) for name in service.runs]}

    @routes.get("/v1/models/{name}", responses=missing)
    async def openai_model(name: str) -> dict[str, Any]:
        """A model by OpenAI's protocol."""
        service.run(name)
        return _openai_model(name)

    @routes.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the server is there."""
        return {"status": "ok"}

    @routes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """Counts for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


async def _ready(answer: BaseModel, status: int = 200) -> Any:
    """The answer as it is sent; a large one is written out in a thread, for it would stop all others."""
    large = _figures(answer) >= _LARGE
    written = await asyncio.to_thread(answer.model_dump_json) if large else answer.model_dump_json()
    content = written.encode()
    if len(content) <= _PART:
        return Response(content, status, media_type="application/json")
    parts = (content[start : start + _PART] for start in range(0, len(content), _PART))
    return StreamingResponse(_each(parts), status, {"Content-Length": str(len(content))}, "application/json")


async def _each(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def _figures(part: Any) -> int:
    """How long the lists of an answer are, and those within them, where it matters."""
    if isinstance(part, BaseModel):
        return sum(_figures(one) for _, one in part)
    if not isinstance(part, list):
        return 0
    deep = part and isinstance(part[0], BaseModel) and len(part) < _LARGE
    return len(part) + (sum(map(_figures, part)) if deep else 0)


def _openai_model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "unrolled"}


def _events(what: str) -> dict[int | str, dict[str, Any]]:
    event = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}
    return {200: {"content": {"text/event-stream": {"schema": event}}, "description": f"With stream: {what}"}}


async def _written(writing: Writing) -> AsyncIterator[str]:
    async for drawn in writing:
        for index, text in enumerate(drawn.pieces):
            if text:
                yield f"data: {json.dumps({'index': index, 'text': text}, ensure_ascii=False)}\n\n"
    yield f"event: done\ndata: {writing.answer().model_dump_json()}\n\n"


def _streamed(events: AsyncIterator[str], seconds: float) -> Any:
    """Events as they come; after so many seconds a problem, and the end."""

    async def bounded() -> AsyncIterator[str]:
        end = asyncio.get_running_loop().time() + seconds
        try:
            while True:
                async with asyncio.timeout_at(end):  # never around a yield: it would end what is outside
                    event = await anext(events, None)
                if event is None:
                    return
                yield event
        except TimeoutError:
            yield f"event: error\ndata: {bytes(problem(408, f'not done within {seconds:g} s').body).decode()}\n\n"

    return StreamingResponse(bounded(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _page(app: FastAPI) -> None:
    kinds = {"index.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}
    headers = {
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    def serve(name: str) -> Callable[[], Any]:
        content = (_PAGE / name).read_bytes()

        async def file() -> Response:
            return Response(content, media_type=kinds[name], headers=headers)

        return file

    for name in kinds:
        path = "/" if name == "index.html" else f"/{name}"
        app.add_api_route(path, serve(name), include_in_schema=False, response_class=Response)


# ------------------------------------------------------------------------------------------------ what goes wrong


def _unrolled_error(request: Request, error: Exception) -> Response:
    if isinstance(error, Refused):
        return problem(error.status, str(error), error.param)
    return problem(422, str(error))


def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    first = next((e for e in found if e["type"] not in ("string_type", "list_type")), found[0])  # not "or a string"
    place = ".".join(str(part) for part in first["loc"] if str(part).isidentifier() or isinstance(part, int))
    place = place.removeprefix("body.").removeprefix("query.").removeprefix("path.").removesuffix(".str")
    if place == "body" and not request.headers.get("content-type", "").startswith("application/json"):
        return problem(422, "a request in JSON wants the header Content-Type: application/json")
    if first["type"] == "json_invalid":
        return problem(400, f"the request is not JSON: {first['ctx']['error']}")
    return problem(422, f"{place or 'the request'}: {first['msg']}", place or None)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, str(error.detail), headers=error.headers)
