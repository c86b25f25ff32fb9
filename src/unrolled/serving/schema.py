"""What is asked and answered over HTTP, field by field."""

from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from unrolled.inference.sampling import Sampling

_DEFAULT = Sampling()


def _utf8(text: str) -> str:
    """Refuses what JSON can say and no text can: half of a pair of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("not UTF-8") from error
    return text


Words: TypeAlias = Annotated[str, AfterValidator(_utf8)]
"""A text of any length."""
Name: TypeAlias = Annotated[str, Field(max_length=300), AfterValidator(_utf8)]
"""A short one: of a model, a token, a stop."""
Texts: TypeAlias = Words | Annotated[list[Words], Field(max_length=10_000, fail_fast=True)]
Stops: TypeAlias = Name | Annotated[list[Name], Field(max_length=16)]
K: TypeAlias = Annotated[int, Field(ge=1, le=1_000)]
Figure: TypeAlias = float | None


class Request(BaseModel):
    """What every request may name."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    model: Name | None = Field(None, description="A model by name; the first of `GET /models` where left out.")


class Answer(BaseModel):
    """What every answer names."""

    model: str


class Problem(BaseModel):
    """What went wrong, in one line."""

    class Detail(BaseModel):
        message: str
        type: str
        param: str | None = None
        code: str | None = None

    error: Detail


# ------------------------------------------------------------------------------------------------ scores


class ScoreRequest(Request):
    """Texts to be scored, each by itself; the lines of a document are one text, parted by line ends."""

    texts: Texts
    begin: bool = Field(True, description="The first token follows the end of a line; else it is read, not scored.")
    end: bool = Field(True, description="The end of the line is scored.")
    unknown: Literal["count", "skip", "spell"] = Field(
        "count", description="`<unk>` counts as it is, is left out, or its letters are charged too."
    )
    per_token: bool = False


class TokenScore(BaseModel):
    """One token: its natural log-probability, and the same as surprisal in bits."""

    token: str
    text: str | None = Field(None, description="Of a session: the token as it stands in the text.")
    log_prob: Figure
    surprisal_bits: Figure


class TextScore(BaseModel):
    """A text's log-probability in nats; or why it has none, in `error`."""

    log_prob: Figure = None
    tokens: int | None = None
    unknown: int | None = None
    perplexity: Figure = None
    per_token: list[TokenScore] | None = None
    error: str | None = None


class ScoreAnswer(Answer):
    """A score for each text, in the same order."""

    scores: list[TextScore]


# ------------------------------------------------------------------------------------------------ predictions


class PredictRequest(Request):
    """Beginnings of lines; what comes next?"""

    prefixes: Texts = ""
    k: K = 10
    unknown: bool = Field(False, description="Whether `<unk>` may be among them.")
    complete: bool = Field(False, description="The last word is still being typed: only what may become of it.")
    length: int = Field(1, ge=1, le=10, description="Tokens of each; more than one are found by beam search.")


class Word(BaseModel):
    """A token, or the text that several add, and how probable."""

    word: str
    probability: Figure


class Prediction(BaseModel):
    """By falling probability."""

    prefix: str
    unknown: int = Field(0, description="Words of the prefix that the model reads as `<unk>`.")
    words: list[Word]


class PredictAnswer(Answer):
    """A prediction for each prefix, in the same order."""

    predictions: list[Prediction]


# ------------------------------------------------------------------------------------------------ texts


class GenerateRequest(Request):
    """A text to be continued."""

    prompt: Words = ""
    session: Name | None = Field(None, description="In place of a prompt: goes on where a session stands.")
    length: int = Field(100, ge=0, le=100_000, description="Tokens to draw, at most.")
    samples: int = Field(1, ge=1, le=1_024)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    temperature: float = Field(_DEFAULT.temperature, ge=0, le=1e6)
    top_k: int = Field(_DEFAULT.top_k, ge=0, le=1 << 31)
    top_p: float = Field(_DEFAULT.top_p, gt=0, le=1)
    min_p: float = Field(_DEFAULT.min_p, ge=0, le=1)
    repetition_penalty: float = Field(
        _DEFAULT.repetition_penalty,
        ge=1,
        le=1e6,
        description="Of what stands in the prompt, or was drawn; of a session, its last 8 tokens.",
    )
    banned: list[Name] = Field([], max_length=1_000)
    unknown: bool = Field(_DEFAULT.unknown, description="Whether `<unk>` may be drawn.")
    stop: Stops = []
    random_start: bool = Field(False, description="In place of a prompt: the first token is drawn from all alike.")
    detokenize: bool = Field(False, description="Tokens parted by spaces become text as people write it.")
    stream: bool = Field(False, description="The answer comes as server-sent events, a piece at a time.")


class Text(BaseModel):
    """A text that was drawn: what follows the prompt."""

    text: str
    tokens: int
    finish_reason: Literal["length", "stop"]


class GenerateAnswer(Answer):
    """The texts, and the seed that draws them again."""

    prompt: str
    seed: int
    texts: list[Text]


# ------------------------------------------------------------------------------------------------ sessions


class SessionRequest(Request):
    """The beginning of a text that will grow."""

    text: Words = ""
    k: int = Field(10, ge=0, le=1_000, description="How many of the likeliest next tokens to answer with.")
    unknown: bool = False


class ReadRequest(BaseModel):
    """More of a session's text: whole tokens."""

    model_config = ConfigDict(extra="forbid")
    text: Words = ""
    k: int = Field(10, ge=0, le=1_000)
    unknown: bool = False
    typed: Name = Field("", description="One word being typed after it, which is not read: what may become of it.")


class SessionAnswer(Answer):
    """Where a session stands: what was read just now, and what comes next."""

    session: str
    tokens: int
    read: list[TokenScore]
    words: list[Word]


# ------------------------------------------------------------------------------------------------ embeddings, models


class EmbeddingsRequest(Request):
    """Single tokens."""

    words: Annotated[list[Name], Field(min_length=1, max_length=1_000)]
    k: K = 10
    vectors: bool = Field(False, description="Whether to answer with the vectors themselves.")


class Neighbour(BaseModel):
    """A token, and the cosine of the angle between its vector and that of the one asked for."""

    word: str
    similarity: Figure


class Embedding(BaseModel):
    """What a model has learnt about a token; or why there is nothing, in `error`."""

    word: str
    neighbours: list[Neighbour] = []
    vector: list[float] | None = None
    error: str | None = None


class EmbeddingsAnswer(Answer):
    """One for each word, in the same order."""

    embeddings: list[Embedding]


class ModelInfo(BaseModel):
    """A model that answers here."""

    name: str
    recipe: str
    tokens: str = Field(description="word, character, byte or bpe")
    vocabulary: int
    parameters: int
    corpus: str
    precision: str
    test_perplexity: Figure = None


class ModelsAnswer(BaseModel):
    """All models; the first answers where none is named."""

    models: list[ModelInfo]


class MapAnswer(Answer):
    """The commonest tokens, and where they lie on a map that puts those alike near each other."""

    tokens: list[str]
    places: list[Annotated[list[float], Field(min_length=2, max_length=2)]]


class CurvesAnswer(Answer):
    """An epoch's figures each."""

    class Epoch(BaseModel):
        epoch: int
        train_perplexity: Figure = None
        valid_perplexity: Figure = None
        learning_rate: Figure = None

    epochs: list[Epoch]
