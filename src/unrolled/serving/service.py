"""The answers themselves, apart from HTTP: each takes a request of `schema` and gives its answer."""

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch

from unrolled.errors import UnrolledError, did_you_mean
from unrolled.inference.detokenize import detokenize
from unrolled.inference.embeddings import map_tokens, neighbours
from unrolled.inference.generate import Drawing, Question, new_seed
from unrolled.inference.reading import NOTHING, Unread
from unrolled.inference.sampling import Sampling
from unrolled.inference.score import Score
from unrolled.metrics import finite, read_metrics
from unrolled.nn.unroll import LayerStates, pick
from unrolled.run import Run
from unrolled.serving import schema
from unrolled.serving.engine import Drawn, Engine, Read
from unrolled.serving.sessions import Place, Session, Sessions


class Refused(UnrolledError):
    """A request that is not answered, with the status that says why."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


@dataclass(frozen=True)
class Limits:
    """What one request, and all sessions together, may take."""

    body_bytes: int = 16 << 20
    """Of a request."""
    tokens: int = 200_000
    """Read or drawn by one request, all its texts together."""
    samples: int = 64
    """Texts drawn by one request."""
    seconds: float = 60.0
    """Until a request is given up."""
    requests: int = 256
    """Answered at the same time."""
    sessions: int = 1_000
    session_bytes: int = 256 << 20
    """Of all of them."""
    idle_s: float = 900.0
    """After which an unused session ends."""


@final
class Service:
    """Models by name, the engine that runs them, and the sessions.

    Args:
        runs: opened run folders by name; the first answers where none is named.
        limits: of requests.
        threads: that computing may use.
    """

    def __init__(self, runs: dict[str, Run], limits: Limits, threads: int = 1) -> None:
        self.runs, self.limits = runs, limits
        self.engine = Engine(threads)
        self.sessions = Sessions(limits.sessions, limits.session_bytes, limits.idle_s)
        self.tokens_read = self.tokens_drawn = 0
        self._maps: dict[tuple[str, int], asyncio.Task[schema.MapAnswer]] = {}

    def close(self) -> None:
        """Ends the engine."""
        self.engine.close()

    def run(self, name: str | None) -> tuple[str, Run]:
        """The model of that name.

        Raises:
            Refused: there is none.
        """
        name = next(iter(self.runs)) if name is None else name
        if name not in self.runs:
            raise Refused(404, f"no model {name!r}{did_you_mean(name, list(self.runs))}", "model")
        return name, self.runs[name]

    # -------------------------------------------------------------------------------------------- scores

    async def score(self, request: schema.ScoreRequest) -> schema.ScoreAnswer:
        """Every text by itself; an error stands in the place of one that cannot be scored."""
        name, run = self.run(request.model)
        texts = _listed(request.texts)
        scores = await self.scores(run, texts, begin=request.begin, end=request.end, unknown=request.unknown)
        return schema.ScoreAnswer(model=name, scores=[_score(score, request.per_token) for score in scores])

    async def scores(self, run: Run, texts: Sequence[str], **options: Any) -> list[Score | UnrolledError]:
        """Scores as `Run.score_many` gives them; the options are its."""
        scorer = run.scorer(most_tokens=self.limits.tokens, **options)
        encoded: dict[int, np.ndarray] = {}
        found: dict[int, Score | UnrolledError] = {}
        for number, text in enumerate(texts):
            try:
                encoded[number] = scorer.encoded(text)
            except UnrolledError as error:
                found[number] = error
        results = await self.read(run, [Unread(ids[:-1], ids[1:]) for ids in encoded.values()])
        for (number, ids), result in zip(encoded.items(), results, strict=True):
            found[number] = scorer.scored(texts[number], ids, result.nats)
        return [found[number] for number in range(len(texts))]

    # -------------------------------------------------------------------------------------------- predictions

    async def predict(self, request: schema.PredictRequest) -> schema.PredictAnswer:
        """The likeliest next tokens, or by beam search the likeliest next few."""
        name, run = self.run(request.model)
        prefixes = _listed(request.prefixes)
        if request.length > 1:
            return schema.PredictAnswer(model=name, predictions=[await self._beam(run, p, request) for p in prefixes])
        asked = [Question(run.tokenizer, prefix, request.k, request.unknown, request.complete) for prefix in prefixes]
        results = await self.read(run, [Unread(question.ids, NOTHING, follows=True) for question in asked])
        answers = (question.answer(_followed(read)) for question, read in zip(asked, results, strict=True))
        predictions = [schema.Prediction(prefix=answer.prefix, words=_words(answer.words)) for answer in answers]
        return schema.PredictAnswer(model=name, predictions=predictions)

    async def _beam(self, run: Run, prefix: str, request: schema.PredictRequest) -> schema.Prediction:
        self._allow(len(run.tokenizer.encode(prefix)) + request.length * request.k)
        if request.complete:
            raise Refused(422, "complete takes a length of 1", "complete")
        width = min(max(20, request.k), 200)
        k, options = min(request.k, width), {"width": width, "unknown": request.unknown}
        found = await self.engine.call(lambda: run.continuations(prefix, request.length, k, **options))
        return schema.Prediction(prefix=prefix, words=_words([(text, math.exp(value)) for text, value in found]))

    # -------------------------------------------------------------------------------------------- texts

    async def generate(self, request: schema.GenerateRequest) -> "Writing":
        """A writing under way; what can be wrong has been said."""
        name, run = self.run(request.model)
        session = None if request.session is None else self.session(request.session)
        if session and (request.prompt or request.random_start):
            raise Refused(422, "a session takes the place of a prompt and of a random start", "session")
        if session and request.model is not None and request.model != session.model:
            raise Refused(422, f"the session is of the model {session.model!r}", "model")
        name, run = (session.model, session.run) if session else (name, run)
        seed = new_seed() if request.seed is None else request.seed
        options = {field: getattr(request, field) for field in _SAMPLING} | {"banned": tuple(request.banned)}
        drawing = self.drawing(
            *(run, request.prompt, request.samples, request.length, seed, request.random_start),
            *(tuple(request.stop), Sampling(**options)),
        )
        if session:
            start = session.place.log_probs.expand(request.samples, -1), session.place.states
        elif request.random_start:
            start = None, run.model.initial_state(1)
        else:
            start = await self.read_prompt(run, drawing)
        return Writing(self, run, drawing, start, name, request.prompt, seed, request.detokenize)

    def drawing(self, run: Run, prompt: str, samples: int, length: int, *rest: Any) -> Drawing:
        """A drawing within the limits.

        Raises:
            Refused: it is beyond them.
        """
        if samples > self.limits.samples:
            raise Refused(422, f"{samples} samples are more than {self.limits.samples}", "samples")
        drawing = Drawing(run.tokenizer, prompt, samples, length, *rest)
        self._allow(len(drawing.prompt_ids) + samples * length)
        return drawing

    async def read_prompt(self, run: Run, drawing: Drawing) -> tuple[torch.Tensor | None, LayerStates]:
        """What a drawing begins from: log-probabilities (B, V) and the state (B = 1) after its prompt."""
        (read,) = await self.read(run, [Unread(drawing.prompt_ids, NOTHING, follows=True)])
        return _followed(read).expand(len(drawing.writers), -1), read.states

    # -------------------------------------------------------------------------------------------- sessions

    def session(self, id: str) -> Session:
        """The session of that name.

        Raises:
            Refused: there is none, or no longer.
        """
        if (session := self.sessions.find(id)) is None:
            raise Refused(404, "no such session: it ended, was unused for too long, or made room for others")
        return session

    async def begin(self, request: schema.SessionRequest) -> schema.SessionAnswer:
        """A new session, which has read the end of a line and then the text."""
        name, run = self.run(request.model)
        start = np.array([run.tokenizer.start_id], np.int64)
        ids = np.concatenate([start, run.tokenizer.encode(request.text)]).astype(np.int64)
        (read,) = await self.read(run, [Unread(ids, ids[1:], follows=True)])
        session = self.sessions.begin(name, run, _place(read, len(ids) - 1))
        pairs = list(zip(ids[1:].tolist(), read.nats.tolist(), strict=True))
        return self._standing(session, pairs, request.k, request.unknown, "")

    async def go_on(self, id: str, request: schema.ReadRequest) -> schema.SessionAnswer:
        """A session reads more, a step for each token."""
        session = self.session(id)
        async with session.lock:
            ids, place = session.run.tokenizer.encode(request.text).astype(np.int64), session.place
            pairs: list[tuple[int, float]] = []
            if len(ids):
                (read,) = await self.read(session.run, [Unread(ids, ids[1:], follows=True)], place.states)
                nats = [-float(place.log_probs[ids[0]]), *read.nats.tolist()]
                pairs = list(zip(ids.tolist(), nats, strict=True))
                self.sessions.go_on(session, _place(read, place.tokens + len(ids)))
            return self._standing(session, pairs, request.k, request.unknown, request.complete)

    def fork(self, id: str) -> schema.SessionAnswer:
        """A second session where the first stands."""
        return self._standing(self.sessions.fork(self.session(id)), [], 0, False, "")

    def standing(self, id: str) -> schema.SessionAnswer:
        """Where a session stands."""
        return self._standing(self.session(id), [], 10, False, "")

    def _standing(
        self, session: Session, read: list[tuple[int, float]], k: int, unknown: bool, complete: str
    ) -> schema.SessionAnswer:
        tokenizer, words = session.run.tokenizer, []
        if k:
            question = Question(tokenizer, complete, k, unknown, complete=bool(complete))
            words = question.answer(session.place.log_probs).words
        tokens = [_token(tokenizer.token(id), -nats) for id, nats in read]
        return schema.SessionAnswer(
            model=session.model, session=session.id, tokens=session.place.tokens, read=tokens, words=_words(words)
        )

    # -------------------------------------------------------------------------------------------- about the models

    async def embeddings(self, request: schema.EmbeddingsRequest) -> schema.EmbeddingsAnswer:
        """Neighbours of words, and their vectors."""
        name, run = self.run(request.model)
        found = []
        for word in request.words:
            pairs = await self.engine.call(neighbours, run.model, run.tokenizer, word, request.k)
            near = [schema.Neighbour(word=other, similarity=value) for other, value in pairs]
            vector = run.model.token_vectors[run.tokenizer.id_of(word)].tolist() if request.vectors else None
            found.append(schema.Embedding(word=word, neighbours=near, vector=vector))
        return schema.EmbeddingsAnswer(model=name, embeddings=found)

    def models(self) -> schema.ModelsAnswer:
        """All models."""
        return schema.ModelsAnswer(models=[_info(name, run) for name, run in self.runs.items()])

    async def map(self, name: str, words: int) -> schema.MapAnswer:
        """Where the commonest tokens lie; it takes some seconds once, and is then remembered.

        Raises:
            Refused: no such model, or no map can be made of it.
        """
        name, run = self.run(name)
        key = (name, words)
        if key not in self._maps:

            async def made() -> schema.MapAnswer:
                tokens, places = await asyncio.to_thread(map_tokens, run.model, run.tokenizer, words)
                return schema.MapAnswer(model=name, tokens=tokens, places=[(float(x), float(y)) for x, y in places])

            self._maps[key] = asyncio.create_task(made())
        return await asyncio.shield(self._maps[key])

    def curves(self, name: str) -> schema.CurvesAnswer:
        """How the training of a model went."""
        name, run = self.run(name)
        fields = schema.CurvesAnswer.Epoch.model_fields
        epochs = [finite(record) for record in read_metrics(run.folder) if "valid_perplexity" in record]
        return schema.CurvesAnswer(
            model=name,
            epochs=[schema.CurvesAnswer.Epoch(**{field: record.get(field) for field in fields}) for record in epochs],
        )

    # -------------------------------------------------------------------------------------------- within

    def _allow(self, tokens: int) -> None:
        if tokens > self.limits.tokens:
            raise Refused(422, f"{tokens:,} tokens are more than {self.limits.tokens:,}")

    async def read(self, run: Run, texts: list[Unread], states: LayerStates | None = None) -> list[Read]:
        """Reads texts within the limits.

        Raises:
            Refused: they are beyond them.
        """
        tokens = sum(len(text.ids) for text in texts)
        self._allow(tokens)
        results = await self.engine.read(run, texts, states)
        self.tokens_read += tokens
        return results


@final
class Writing:
    """Texts being written. Iterate it for pieces, then `answer` has the whole."""

    def __init__(
        self,
        service: Service,
        run: Run,
        drawing: Drawing,
        start: tuple[torch.Tensor | None, LayerStates],
        model: str,
        prompt: str,
        seed: int,
        detokenized: bool = False,
    ) -> None:
        self.service, self.run, self.drawing = service, run, drawing
        self.model, self.prompt, self.seed, self.detokenized = model, prompt, seed, detokenized
        self._log_probs, states = start
        self._states = pick(states, [0] * len(drawing.writers))
        self.texts = [""] * len(drawing.writers)

    async def __aiter__(self) -> AsyncIterator[Drawn]:
        async for drawn in self.service.engine.draw(self.run, self.drawing, self._log_probs, self._states):
            for number, piece in enumerate(drawn.pieces):
                self.texts[number] += piece
            self.service.tokens_drawn += len(drawn.ids)
            yield drawn

    def answer(self) -> schema.GenerateAnswer:
        """All texts as far as they were written."""
        texts = [
            schema.Text(
                text=detokenize(text) if self.detokenized else text,
                tokens=tokens,
                finish_reason="stop" if writer.done else "length",
            )
            for text, tokens, writer in zip(self.texts, self.drawing.tokens, self.drawing.writers, strict=True)
        ]
        return schema.GenerateAnswer(model=self.model, prompt=self.prompt, seed=self.seed, texts=texts)


_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "unknown")


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _place(read: Read, tokens: int) -> Place:
    return Place(read.states, _followed(read), tokens)


def _followed(read: Read) -> torch.Tensor:
    assert read.log_probs is not None, "what follows was not asked for"
    return read.log_probs


def _words(pairs: list[tuple[str, float]]) -> list[schema.Word]:
    return [schema.Word(word=word, probability=value) for word, value in pairs]


def _token(token: str, log_prob: float) -> schema.TokenScore:
    return schema.TokenScore(token=token, log_prob=finite(log_prob), surprisal_bits=finite(-log_prob / math.log(2)))


def _score(score: Score | UnrolledError, per_token: bool) -> schema.TextScore:
    if isinstance(score, UnrolledError):
        return schema.TextScore(error=str(score))
    tokens = [_token(*pair) for pair in score.per_token] if per_token else None
    return schema.TextScore(
        log_prob=finite(score.log_prob),
        tokens=score.tokens,
        unknown=score.unknown,
        perplexity=finite(score.perplexity),
        per_token=tokens,
    )


def _info(name: str, run: Run) -> schema.ModelInfo:
    test = run.manifest.get("results", {}).get("test", {})
    return schema.ModelInfo(
        name=name,
        recipe=run.recipe.name,
        tokens=run.tokenizer.unit,
        vocabulary=len(run.tokenizer),
        parameters=run.model.num_parameters(),
        corpus=run.manifest["corpus"]["name"],
        precision=run.precision,
        test_perplexity=finite(test.get("perplexity")),
    )
