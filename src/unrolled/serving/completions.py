"""OpenAI's protocol for completions, for clients that speak it."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal, final

from pydantic import BaseModel, ConfigDict, Field

from unrolled.inference.generate import Drawing, going_on, new_seed
from unrolled.inference.reading import Unread
from unrolled.inference.sampling import Sampling
from unrolled.run import Run
from unrolled.serving.aside import aside
from unrolled.serving.engine import Drawn, Read
from unrolled.serving.limits import Refused
from unrolled.serving.schema import Name, Stops, Words
from unrolled.serving.service import Service
from unrolled.serving.writing import Writing

_MOST_LIKELIEST = 20
_LEAST_TOP_P = 1e-9
"""Which leaves the likeliest alone, as 0 does by this protocol."""


class CompletionRequest(BaseModel):
    """A completion as OpenAI's clients ask for it; fields that they may add are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)
    model: Name = Field(description="A model by name.")
    prompt: Words | Annotated[list[Words], Field(min_length=1, max_length=1_000, fail_fast=True)] | None = ""
    max_tokens: int | None = Field(16, ge=0, le=100_000)
    n: int | None = Field(1, ge=1, le=128)
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, ge=0, le=1)
    logprobs: int | None = Field(None, ge=0, le=_MOST_LIKELIEST)
    echo: bool | None = False
    stop: Stops | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    best_of: int | None = Field(None, description="No more than n.")
    suffix: str | None = Field(None, description="Not supported.")
    presence_penalty: float | None = Field(0.0, description="Not supported: 0.")
    frequency_penalty: float | None = Field(0.0, description="Not supported: 0.")
    logit_bias: dict[str, float] | None = Field(None, description="Not supported: empty.")
    begin: bool = Field(True, description="Ours: the prompt begins a line; else its first token follows nothing.")
    unknown: bool = Field(False, description="Ours: whether `<unk>` may be drawn.")


class LogProbs(BaseModel):
    """Natural log-probabilities of tokens; a text's first has none where nothing stands before it."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] = []

    def copied(self) -> "LogProbs":
        """The same, in lists of its own."""
        return self.model_copy(update={name: list(part) for name, part in self if part is not None})

    def extend(self, more: "LogProbs") -> None:
        """Appends those of the tokens that follow."""
        self.tokens += more.tokens
        self.token_logprobs += more.token_logprobs
        self.text_offset += more.text_offset
        if more.top_logprobs is not None:
            self.top_logprobs = self.top_logprobs or []
            self.top_logprobs += more.top_logprobs


class Choice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: LogProbs | None = None
    finish_reason: Literal["length", "stop"] | None = None


class Usage(BaseModel):
    """Tokens that were read and drawn."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """The answer, or where it is streamed one piece of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


@final
class Completing:
    """One request on its way to its answer. Made by `complete`; then either `whole` or `pieces`."""

    def __init__(self, service: Service, request: CompletionRequest, name: str, run: Run) -> None:
        self.service, self.request, self.run = service, request, run
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        self.prompts = request.prompt if isinstance(request.prompt, list) else [request.prompt or ""]
        self.n, self.length = request.n or 1, 16 if request.max_tokens is None else request.max_tokens
        self.prompt_tokens = self.completion_tokens = 0
        self.begun: list[tuple[Choice, Writing]] = []

    async def begin(self) -> None:
        """Reads the prompts; what can be wrong has been said."""
        request, run = self.request, self.run
        stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
        sampling = Sampling(
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else max(request.top_p, _LEAST_TOP_P),
            unknown=request.unknown,
        )
        seed = new_seed() if request.seed is None else request.seed % (1 << 63)
        self.service.allow_drawing(len(self.prompts) * self.n, self.length)
        figures = self.n * (1 + (request.logprobs or 0))
        wants, size = request.logprobs is not None, sum(map(len, self.prompts))

        def drawings() -> Iterator[tuple[Drawing, Unread]]:
            for number, prompt in enumerate(self.prompts):
                options = (False, stop, sampling)
                drawing = Drawing(run.tokenizer, prompt, self.n, self.length, (seed + number) % (1 << 63), *options)
                ids = drawing.prompt_ids[not request.begin :]
                if not len(ids):
                    raise Refused(422, "an empty prompt has to begin a line", "begin")
                targets = ids[1:] if request.echo and wants else ids[:0]
                yield drawing, Unread(ids, targets, top=request.logprobs or 0, follows=True)

        asked = await aside(size, lambda: list(drawings()), encodes=run.tokenizer)
        if wants:
            shown = sum(self.length + len(text.targets) for _, text in asked)
            self.service.allow(shown * figures, "log-probabilities of an answer")
        reads = await self.service.read(run, [text for _, text in asked])
        heads = await aside(
            size,
            lambda: [self._head(prompt, read) for prompt, read in zip(self.prompts, reads, strict=True)],
            encodes=run.tokenizer,
        )
        for prompt, (drawing, text), read, head in zip(self.prompts, asked, reads, heads, strict=True):
            self.prompt_tokens += len(text.ids) - request.begin
            start = read.log_probs, read.states
            writing = Writing(self.service.engine, run, drawing, start, self.head["model"], prompt, seed, False, wants)
            self.begun.append((head, writing))

    def _head(self, prompt: str, read: Read) -> Choice:
        """A choice before anything is drawn."""
        if not self.request.echo:
            return Choice(index=0, text="")
        return Choice(index=0, text=prompt, logprobs=self._echoed(prompt, read.nats.tolist(), read.likeliest))

    def _echoed(self, prompt: str, nats: list[float], likeliest: list[list[tuple[int, float]]]) -> LogProbs | None:
        """The prompt's own tokens."""
        if self.request.logprobs is None:
            return None
        pieces = self.run.tokenizer.pieces(prompt)
        missing: list[None] = [None] * (len(pieces) - len(nats))
        found = LogProbs(tokens=pieces, token_logprobs=[*missing, *(-value for value in nats)])
        if self.request.logprobs:
            before = ["\n", *pieces][len(missing) :]
            found.top_logprobs = [*missing, *map(self._named, likeliest, before)]
        place = 0
        for piece in pieces:
            found.text_offset.append(place)
            place += len(piece)
        return found

    def _named(self, likeliest: list[tuple[int, float]], before: str) -> dict[str, float]:
        """Tokens as they would stand after the text before them, the likeliest first."""
        return {self._text(id, before.endswith("\n")): value for id, value in likeliest}

    def _text(self, id: int, at_line_start: bool) -> str:
        tokenizer, token = self.run.tokenizer, self.run.tokenizer.token(id)
        if tokenizer.unit == "word":
            return "\n" if token == "<eos>" else token if at_line_start else f" {token}"
        if tokenizer.unit == "character" or token.encode() == tokenizer.bytes_of(id):
            return token
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.bytes_of(id))  # OpenAI's parts of characters

    async def steps(self) -> AsyncIterator[Choice]:
        """What each token adds to each choice; the last of a choice has its reason to finish."""
        for number, (head, writing) in enumerate(self.begun):
            rows = [_Row(number * self.n + row, writing, bool(self.request.echo)) for row in range(self.n)]
            for row in rows:
                if self.request.echo:
                    yield head.model_copy(update={"index": row.index})
            async for drawn in writing:
                for place, row in enumerate(rows):
                    if row.ended:
                        continue
                    logprobs = self._drawn(drawn, place, row)
                    self.completion_tokens += drawn.tokens[place] - row.tokens
                    row.tokens, row.ended = drawn.tokens[place], drawn.stopped[place]
                    reason: Literal["stop"] | None = "stop" if row.ended else None
                    yield Choice(index=row.index, text=drawn.pieces[place], logprobs=logprobs, finish_reason=reason)
            for row in rows:
                if not row.ended:
                    yield Choice(index=row.index, text="", finish_reason="length")

    def _drawn(self, drawn: Drawn, place: int, row: "_Row") -> LogProbs | None:
        """The token that was drawn: as it stands there, though a stop that it may begin holds its text back."""
        if drawn.log_probs is None:
            return None
        values, id, before = drawn.log_probs[place], drawn.ids[place], row.text
        row.text = row.decode(id)
        found = LogProbs(tokens=[row.text], token_logprobs=[float(values[id])], text_offset=[row.offset])
        row.offset += len(row.text)
        if self.request.logprobs:
            largest, ids = values.topk(min(self.request.logprobs, len(values)))
            found.top_logprobs = [self._named(list(zip(ids.tolist(), largest.tolist(), strict=True)), before)]
        return found

    async def whole(self) -> Completion:
        """The answer at once."""
        choices: dict[int, Choice] = {}
        async for step in self.steps():
            if step.index not in choices:
                choices[step.index] = step.model_copy(update={"logprobs": step.logprobs and step.logprobs.copied()})
                continue
            choice = choices[step.index]
            choice.text += step.text
            choice.finish_reason = step.finish_reason or choice.finish_reason
            if step.logprobs and choice.logprobs:
                choice.logprobs.extend(step.logprobs)
            else:
                choice.logprobs = choice.logprobs or step.logprobs
        return Completion(**self.head, choices=[choices[index] for index in sorted(choices)], usage=self._usage())

    async def pieces(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        async for step in self.steps():
            yield _event(Completion(**self.head, choices=[step]))
        if (self.request.stream_options or {}).get("include_usage"):
            yield _event(Completion(**self.head, choices=[], usage=self._usage()))
        yield "data: [DONE]\n\n"

    def _usage(self) -> Usage:
        read, drawn = self.prompt_tokens, self.completion_tokens
        return Usage(prompt_tokens=read, completion_tokens=drawn, total_tokens=read + drawn)


@final
class _Row:
    """One choice as it grows: its last token's text, where the next begins."""

    def __init__(self, index: int, writing: Writing, echo: bool) -> None:
        prompt, drawing = writing.prompt, writing.drawing
        self.index, self.tokens, self.ended = index, 0, False
        self.decode = going_on(writing.run.tokenizer, drawing.prompt_ids)
        at_line_start = drawing.prompt_ids[-1] == writing.run.tokenizer.start_id
        self.text, self.offset = "\n" if at_line_start else prompt, len(prompt) if echo else 0


def _event(completion: Completion) -> str:
    return f"data: {json.dumps(completion.model_dump(mode='json'), ensure_ascii=False)}\n\n"


async def complete(service: Service, request: CompletionRequest) -> Completing:
    """Reads the prompts of a request.

    Raises:
        Refused: it asks for what there is not, or for more than is allowed.
    """
    name, run = service.run(request.model)
    for field in ("suffix", "presence_penalty", "frequency_penalty", "logit_bias"):
        if getattr(request, field):
            raise Refused(422, f"{field} is not supported", field)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise Refused(422, "best_of is not supported beyond n", "best_of")
    completing = Completing(service, request, name, run)
    await completing.begin()
    return completing
