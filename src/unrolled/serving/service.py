"""The answers themselves, apart from HTTP: each takes a request of `schema` and gives its answer."""

import asyncio
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar, final

import numpy as np
import torch

from unrolled.errors import UnrolledError, did_you_mean
from unrolled.inference.embeddings import map_tokens, neighbours
from unrolled.inference.generate import Beam, Drawing, Question, new_seed, next_token, prefix_ids
from unrolled.inference.reading import NOTHING, Unread
from unrolled.inference.sampling import Sampling
from unrolled.inference.score import Score
from unrolled.metrics import epochs_of, finite, read_metrics
from unrolled.nn.unroll import LayerStates
from unrolled.run import Run
from unrolled.serving import schema
from unrolled.serving.aside import aside, in_thread
from unrolled.serving.engine import Engine, Read
from unrolled.serving.limits import Limits, Refused
from unrolled.serving.sessions import Place, Session, Sessions
from unrolled.serving.writing import Start, Writing

T = TypeVar("T")
_WIDEST = 200


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
        self._maps: dict[tuple[str, int], Future[tuple[list[str], np.ndarray]]] = {}

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

        def answers() -> list[schema.TextScore]:
            return [_score(score, request.per_token) for score in scores]

        size = sum(score.tokens for score in scores if isinstance(score, Score))
        return schema.ScoreAnswer(model=name, scores=await aside(size * request.per_token, answers))

    async def scores(self, run: Run, texts: Sequence[str], **options: Any) -> list[Score | UnrolledError]:
        """Scores as `Run.score_many` gives them; the options are its."""
        scorer = run.scorer(most_tokens=self.limits.tokens, **options)
        encoded: dict[int, np.ndarray] = {}
        found: dict[int, Score | UnrolledError] = {}

        def encode() -> None:
            for number, text in enumerate(texts):
                try:
                    encoded[number] = scorer.encoded(text)
                except UnrolledError as error:
                    found[number] = error

        await aside(sum(map(len, texts)), encode, encodes=run.tokenizer)
        results = await self.read(run, [Unread(ids[:-1], ids[1:]) for ids in encoded.values()])

        def put_together() -> None:
            for (number, ids), result in zip(encoded.items(), results, strict=True):
                found[number] = scorer.scored(texts[number], ids, result.nats)

        await aside(sum(map(len, encoded.values())), put_together)
        return [found[number] for number in range(len(texts))]

    # -------------------------------------------------------------------------------------------- predictions

    async def predict(self, request: schema.PredictRequest) -> schema.PredictAnswer:
        """The likeliest next tokens, or by beam search the likeliest next few."""
        name, run = self.run(request.model)
        prefixes = _listed(request.prefixes)
        self.allow(len(prefixes) * request.k * request.length, "words of an answer")
        if request.length > 1 and request.complete:
            raise Refused(422, "complete takes a length of 1", "complete")
        if request.length > 1 and request.k > _WIDEST:
            raise Refused(422, f"with a length of more than 1, k must be at most {_WIDEST}, not {request.k}", "k")

        def questions() -> list[Question]:
            return [
                Question(run.tokenizer, prefix, request.k, request.unknown, request.complete) for prefix in prefixes
            ]

        asked = await aside(sum(map(len, prefixes)), questions, encodes=run.tokenizer)
        self.allow(sum(len(question.ids) for question in asked))
        answer = self._next_words if request.length == 1 else self._beams
        portion = max(1, _MOST_FIGURES // len(run.tokenizer))
        predictions = list[schema.Prediction]()
        for first in range(0, len(asked), portion):
            predictions += await answer(run, asked[first : first + portion], request)
        return schema.PredictAnswer(model=name, predictions=predictions)

    async def _next_words(
        self, run: Run, asked: list[Question], request: schema.PredictRequest
    ) -> list[schema.Prediction]:
        results = await self.read(run, [Unread(question.ids, NOTHING, follows=True) for question in asked])

        def answers() -> list[schema.Prediction]:
            return [
                schema.Prediction(
                    prefix=question.prefix,
                    unknown=_unknown(run, question.ids),
                    words=_words(question.answer(_followed(read)).words),
                )
                for question, read in zip(asked, results, strict=True)
            ]

        return await aside(len(asked) * len(run.tokenizer), answers)

    async def _beams(self, run: Run, asked: list[Question], request: schema.PredictRequest) -> list[schema.Prediction]:
        def searches() -> list[Beam]:
            options = request.length, request.k, max(20, request.k), request.unknown
            return [Beam(run.tokenizer, question.prefix, *options) for question in asked]

        beams = await aside(len(asked) * len(run.tokenizer), searches, encodes=run.tokenizer)
        results = await self.read(run, [Unread(beam.prefix_ids, NOTHING, follows=True) for beam in beams])
        predictions = []
        for question, beam, read in zip(asked, beams, results, strict=True):
            found = await self.engine.last(beam.through(run.model, _followed(read), read.states), run)
            words = _words([(text, math.exp(value)) for text, value in found])
            unknown = _unknown(run, beam.prefix_ids)
            predictions.append(schema.Prediction(prefix=question.prefix, unknown=unknown, words=words))
        return predictions

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
        stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
        self.allow_drawing(request.samples, request.length)
        drawing = await aside(
            len(request.prompt),
            Drawing,
            *(run.tokenizer, request.prompt, request.samples, request.length, seed, request.random_start),
            *(stop, Sampling(**options), session.place.last_ids if session else None),
            encodes=run.tokenizer,
        )
        if session:
            start: Start = session.place.log_probs, session.place.states
        elif request.random_start:
            start = None, run.model.initial_state(1)
        else:
            (read,) = await self.read(run, [Unread(drawing.prompt_ids, NOTHING, follows=True)])
            start = _followed(read), read.states
        return Writing(self.engine, run, drawing, start, name, request.prompt, seed, request.detokenize)

    def allow_drawing(self, texts: int, length: int) -> None:
        """Refuses to draw so many texts of so many tokens, where that is beyond the limits."""
        if texts > self.limits.samples:
            raise Refused(422, f"{texts} samples are more than {self.limits.samples}", "samples")
        self.allow(texts * length)

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
        question = next_token(run.tokenizer, request.k, request.unknown) if request.k else None
        ids = await aside(len(request.text), prefix_ids, run.tokenizer, request.text, encodes=run.tokenizer)
        (read,) = await self.read(run, [Unread(ids, ids[1:], follows=True)])
        session = self.sessions.begin(name, run, Place(read.states, _followed(read), len(ids) - 1, _last(ids)))
        tokens = await aside(len(ids), _tokens, run, request.text, ids[1:], read.nats, encodes=run.tokenizer)
        return _standing(session, tokens, question)

    async def go_on(self, id: str, request: schema.ReadRequest) -> schema.SessionAnswer:
        """A session reads more, a step for each token."""
        session = self.session(id)
        async with session.lock:
            run, place, tokens = session.run, session.place, list[schema.TokenScore]()
            question = next_token(run.tokenizer, request.k, request.unknown, request.typed) if request.k else None
            ids = await aside(len(request.text), run.tokenizer.encode, request.text, encodes=run.tokenizer)
            ids = ids.astype(np.int64)
            if len(ids):
                (read,) = await self.read(run, [Unread(ids, ids[1:], follows=True)], place.states)
                nats = np.concatenate([[-float(place.log_probs[ids[0]])], read.nats])
                tokens = await aside(len(ids), _tokens, run, request.text, ids, nats, encodes=run.tokenizer)
                last = _last(np.concatenate([place.last_ids, ids]))
                self.sessions.go_on(session, Place(read.states, _followed(read), place.tokens + len(ids), last))
            return _standing(session, tokens, question)

    def fork(self, id: str) -> schema.SessionAnswer:
        """A second session where the first stands."""
        session = self.sessions.fork(self.session(id))
        return _standing(session, [], next_token(session.run.tokenizer))

    def standing(self, id: str) -> schema.SessionAnswer:
        """Where a session stands."""
        session = self.session(id)
        return _standing(session, [], next_token(session.run.tokenizer))

    # -------------------------------------------------------------------------------------------- about the models

    async def embeddings(self, request: schema.EmbeddingsRequest) -> schema.EmbeddingsAnswer:
        """Neighbours of words, and their vectors."""
        name, run = self.run(request.model)
        self.allow(len(request.words) * request.k, "words of an answer")

        def steps() -> Iterator[list[schema.Embedding]]:
            found: list[schema.Embedding] = []
            for word in request.words:
                try:
                    pairs = neighbours(run.model, run.tokenizer, word, request.k)
                    near = [schema.Neighbour(word=other, similarity=value) for other, value in pairs]
                    vector = run.model.token_vectors[run.tokenizer.id_of(word)].tolist() if request.vectors else None
                    found.append(schema.Embedding(word=word, neighbours=near, vector=vector))
                except UnrolledError as error:
                    found.append(schema.Embedding(word=word, error=str(error)))
                yield found

        return schema.EmbeddingsAnswer(model=name, embeddings=await self.engine.last(steps()))

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
            self._maps[key] = in_thread(map_tokens, run.model, run.tokenizer, words)
        try:
            tokens, places = await asyncio.wrap_future(self._maps[key])
        except Exception:
            self._maps.pop(key, None)
            raise
        return schema.MapAnswer(model=name, tokens=tokens, places=[[float(x), float(y)] for x, y in places])

    def curves(self, name: str) -> schema.CurvesAnswer:
        """How the training of a model went."""
        name, run = self.run(name)
        fields = schema.CurvesAnswer.Epoch.model_fields
        epochs = map(finite, epochs_of(read_metrics(run.folder)))
        return schema.CurvesAnswer(
            model=name,
            epochs=[schema.CurvesAnswer.Epoch(**{field: record.get(field) for field in fields}) for record in epochs],
        )

    # -------------------------------------------------------------------------------------------- within

    def allow(self, count: int, what: str = "tokens") -> None:
        """Refuses more of something than a request may ask for.

        Raises:
            Refused: it does.
        """
        if count > self.limits.tokens:
            raise Refused(422, f"{count:,} {what} are more than {self.limits.tokens:,}")

    async def read(self, run: Run, texts: list[Unread], states: LayerStates | None = None) -> list[Read]:
        """Reads texts within the limits.

        Raises:
            Refused: they are beyond them.
        """
        self.allow(sum(len(text.ids) for text in texts))
        return await self.engine.read(run, texts, states)


_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "unknown")


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _followed(read: Read) -> torch.Tensor:
    assert read.log_probs is not None, "what follows was not asked for"
    return read.log_probs


_MOST_FIGURES = 4_000_000
"""Log-probabilities that are held at a time for one request."""


def _standing(session: Session, read: list[schema.TokenScore], question: Question | None) -> schema.SessionAnswer:
    place = session.place
    words = _words(question.answer(place.log_probs).words) if question else []
    return schema.SessionAnswer(model=session.model, session=session.id, tokens=place.tokens, read=read, words=words)


def _last(ids: np.ndarray) -> np.ndarray:
    """As many as a decoder remembers."""
    return ids[-9:].copy()


def _unknown(run: Run, ids: np.ndarray) -> int:
    return 0 if run.tokenizer.unknown_id is None else int((ids == run.tokenizer.unknown_id).sum())


def _tokens(run: Run, text: str, ids: np.ndarray, nats: np.ndarray) -> list[schema.TokenScore]:
    """The tokens of a text as they stand in it."""
    pairs = zip(ids.tolist(), nats.tolist(), run.tokenizer.pieces(text), strict=True)
    return [_token(run.tokenizer.token(id), -value, piece) for id, value, piece in pairs]


def _words(pairs: list[tuple[str, float]]) -> list[schema.Word]:
    return [schema.Word(word=word, probability=value) for word, value in pairs]


def _token(token: str, log_prob: float, text: str | None = None) -> schema.TokenScore:
    bits = finite(-log_prob / math.log(2))
    return schema.TokenScore(token=token, text=text, log_prob=finite(log_prob), surprisal_bits=bits)


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
