"""What to train: every choice that decides the result, typed, frozen, with its unit and bound. TOML in and out."""

import codecs
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from unrolled.errors import UnrolledError, did_you_mean

SHIPPED = Path(__file__).parent / "recipes"


Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrNone = Annotated[int, Field(ge=0, le=10**9)]


class Section(BaseModel):
    """A table of the recipe. Frozen; an unknown field is an error; every field's docstring is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Data(Section):
    """Which text, and how it becomes tokens."""

    corpus: str = "stdlib"
    """A known corpus, or a text file, folder or archive, or - for standard input."""
    encoding: str = "utf-8"
    """How the bytes of the text become characters."""
    tokens: Literal["word", "character", "byte", "bpe"] = "word"
    """The unit of text."""
    vocab_size: CountOrNone = 0
    """The most tokens in the vocabulary, the commonest kept; 0 for no limit (bpe: 8000)."""
    min_count: Count = 1
    """What is seen less often in the training text becomes <unk>."""
    unknown: bool = True
    """Whether there is an <unk>; without it, what is not in the vocabulary is an error."""

    @model_validator(mode="after")
    def _every_token_needs_an_id(self) -> Self:
        if not self.unknown and self.tokens in ("word", "character") and (self.min_count > 1 or self.vocab_size):
            raise ValueError(
                "without <unk> the vocabulary has to keep every token: --data.vocab-size 0 --data.min-count 1"
            )
        if self.tokens == "bpe" and self.vocab_size and not 257 <= self.vocab_size <= 1_000_000:
            raise ValueError("vocab_size must be 257 to 1,000,000 for bpe: its 256 bytes and the merges")
        return self


class Model(Section):
    """The recurrent network."""

    cell: Literal["lstm", "gru", "elman", "jordan"] = "lstm"
    """One step of a layer."""
    embedding_size: CountOrNone = 200
    """Length of a token's vector; 0 for none: the first layer reads one-hot tokens."""
    hidden_sizes: Annotated[tuple[Count, ...], Field(min_length=1, max_length=64)] = (200, 200)
    """Units of each layer, from the bottom up."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that a unit is dropped, on the embedding and on every layer's output."""
    tie_weights: bool = False
    """The decoder's matrix is the embedding, whose size is then that of the last layer."""
    init_scale: Annotated[float, Field(gt=0, le=1e6)] = 0.1
    """Weights begin uniform between minus this and this, biases at 0."""
    draw_decoder_bias: bool = False
    """The decoder's biases begin like weights, as in TensorFlow's tutorial."""
    draw_layer_biases: bool = False
    """So do those of the recurrent layers, as in Zaremba's program."""
    forget_bias: Annotated[float, Field(ge=-1e6, le=1e6)] = 0.0
    """Added to the LSTM's forget gate at the start; the references use none."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Of elman and jordan."""
    join: Literal["concatenate", "add"] = "concatenate"
    """How lstm and elman join input and previous hidden layer: one matrix over both; or one for each, with biases."""

    @model_validator(mode="after")
    def _options_belong_to_the_cell(self) -> Self:
        options = {"forget_bias": ["lstm"], "activation": ["elman", "jordan"], "join": ["lstm", "elman"]}
        for name, cells in options.items():
            if self.cell not in cells and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"model.{name} is an option of {' and '.join(cells)}, not of {self.cell}")
        if self.tie_weights and self.embedding_size != self.hidden_sizes[-1]:
            raise ValueError(
                f"model.tie_weights takes an embedding as long as the last layer: model.embedding_size "
                f"{self.hidden_sizes[-1]}, not {self.embedding_size}"
            )
        if self.cell == "jordan" and (self.embedding_size or len(self.hidden_sizes) > 1 or self.dropout):
            raise ValueError(
                "jordan feeds its output back to one layer that reads one-hot tokens: with it go "
                "--model.embedding-size 0, a single one of --model.hidden-sizes, --model.dropout 0"
            )
        return self

    @field_validator("hidden_sizes", mode="before")
    @classmethod
    def _from_command_line(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value


class Training(Section):
    """How the network learns."""

    batch_size: Count = 20
    """Parallel streams."""
    num_steps: Count = 20
    """Length of a window in tokens: how far gradients reach back."""
    max_epochs: Count = 13
    """Passes over the training text."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Plain stochastic gradient descent as in the references, or AdamW."""
    learning_rate: Annotated[float, Field(gt=0, le=3e38)] = 1.0
    """The rate before any schedule lowers it."""
    schedule: Literal["decay", "cosine", "exponential"] = "decay"
    """decay: by epochs. cosine: warm-up, then half a cosine to 0. exponential: by a factor a step to the final one."""
    constant_epochs: CountOrNone = 4
    """Epochs at the full rate under the decay schedule."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Factor on the rate for each epoch after those."""
    decay_convention: Literal["tensorflow", "lua"] = "tensorflow"
    """tensorflow: the first lower rate is that of the epoch after `constant_epochs`. lua: one later, as Zaremba's."""
    final_learning_rate: PositiveFloat = 0.1
    """The rate of the last step under the exponential schedule."""
    warmup_steps: CountOrNone = 0
    """Steps over which the rate rises from 0 under the cosine schedule; no more than a tenth of all."""
    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """AdamW's decay of the weights towards 0."""
    max_grad_norm: PositiveFloat = 5.0
    """The gradient's global norm is clipped to this."""
    norm_convention: Literal["exact", "tensorflow"] = "exact"
    """tensorflow: each time that a token occurs counts by itself in the norm, as its `clip_by_global_norm` has it."""
    seed: NonNegativeInt = 1
    """Of the first parameters and of dropout."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes a GPU where there is one."""
    precision: Literal["auto", "f32", "bf16"] = "auto"
    """bf16: products of bf16, summed in f32, weights in f32. auto: bf16 where the processor has it."""
    save_every: CountOrNone = 2000
    """Steps between resume points within an epoch; 0 for none by steps. Saving never takes over 2 % of the time."""
    save_every_s: PositiveFloat = 60.0
    """Seconds between them."""
    valid_every: CountOrNone = 0
    """Steps between validations within an epoch; 0 for one at its end only."""
    sample_every: CountOrNone = 0
    """Steps between samples of text that are shown; 0 for none. One is recorded at the end of every epoch anyhow."""
    sample_length: Annotated[int, Field(ge=0, le=10_000)] = 100
    """Tokens of a sample; 0 for no samples at all."""

    @field_validator("seed")
    @classmethod
    def _fits_torch(cls, seed: int) -> int:
        if seed >= 1 << 63:
            raise ValueError("must be below 2 to the 63rd")
        return seed


class Recipe(Section):
    """Everything that decides the result of a training."""

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[\w.-]+$")] = "custom"
    """What the run folder is called after."""
    data: Data = Data()
    model: Model = Model()
    training: Training = Training()

    @model_validator(mode="after")
    def _norm_convention_has_its_gradient(self) -> Self:
        sparse = self.training.optimizer == "sgd" and self.model.embedding_size and not self.model.tie_weights
        if self.training.norm_convention == "tensorflow" and not sparse:
            raise ValueError("training.norm_convention tensorflow takes sgd and an embedding that is not the decoder's")
        return self

    def to_toml(self) -> str:
        """Every value, defaults too."""
        return tomli_w.dumps(self.model_dump(mode="json"))

    def changed(self, values: dict[str, Any]) -> "Recipe":
        """A copy with other values.

        Args:
            values: by dotted name: {"training.num_steps": 35, "model.hidden_sizes": "650,650"}.

        Raises:
            UnrolledError: there is no such field, or the value is out of bounds.
        """
        tables = self.model_dump()
        for name, value in values.items():
            section, _, field = name.partition(".")
            known = FIELDS if field else ["name"]
            if name not in known:
                raise UnrolledError(f"no recipe field {name!r}{did_you_mean(name, FIELDS)}")
            if field:
                tables[section][field] = value
            else:
                tables[section] = value
        return _validated(tables, _as_option)

    def value(self, name: str) -> Any:
        """The value of a field by its dotted name, as TOML and JSON have it."""
        found: Any = self.model_dump(mode="json")
        for part in name.split("."):
            found = found[part]
        return found

    def differences(self, other: "Recipe") -> list[str]:
        """The dotted names whose values differ."""
        mine, theirs = self.model_dump(), other.model_dump()
        fields = (name.split(".") for name in FIELDS)
        return [f"{section}.{field}" for section, field in fields if mine[section][field] != theirs[section][field]]


SECTIONS: dict[str, type[Section]] = {"data": Data, "model": Model, "training": Training}
FIELDS = [f"{section}.{field}" for section, fields in SECTIONS.items() for field in fields.model_fields]
"""Every option of a recipe by its dotted name."""


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def recipe_header(name: str) -> str:
    """The comment that a shipped recipe opens with: its command and the figure to expect."""
    lines = (SHIPPED / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def load_recipe(name: str | Path) -> Recipe:
    """A shipped recipe by name, or a TOML file.

    Raises:
        UnrolledError: there is none of that name, or it is not a recipe; the message names the field.
    """
    shipped = SHIPPED / f"{name}.toml"
    path = shipped if str(name) in shipped_recipes() else Path(name)
    if not path.is_file():
        hint = did_you_mean(str(name), shipped_recipes())
        raise UnrolledError(f"no recipe named {str(name)!r}{hint} (unrolled recipes lists them)")
    try:
        content = path.read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError("it is in UTF-16; save it as UTF-8")
        tables = tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        hint = "" if path.suffix == ".toml" else f"; to train on that text: --data {path}"
        raise UnrolledError(f"{path} is not a recipe in TOML: {error}{hint}") from error
    tables.setdefault("name", _as_name(path.stem))
    return _validated(tables, lambda field: f"{path}: {field}")


def _as_name(stem: str) -> str:
    """A file's name as a recipe's name: what a folder may not hold becomes '-'."""
    return "".join(c if c.isalnum() or c in "_.-" else "-" for c in stem)[:100] or "custom"


def _as_option(field: str) -> str:
    return "--" + field.replace("_", "-")


def _validated(tables: dict[str, Any], called: Any) -> Recipe:
    try:
        return Recipe.model_validate(tables)
    except ValidationError as error:
        raise UnrolledError(_explained(error.errors()[0], called)) from error


def _explained(error: ErrorDetails, called: Any) -> str:
    """One line for the first thing wrong: the option, its bound, the value."""
    path = [str(part) for part in error["loc"] if not isinstance(part, int)]
    name, value, bounds = ".".join(path), error["input"], error.get("ctx", {})
    kind = error["type"]
    if kind == "extra_forbidden":
        return f"{called(name)}: there is no such field{did_you_mean(name, FIELDS)}"
    demands = {
        "greater_than_equal": "at least {ge}",
        "greater_than": "more than {gt}",
        "less_than_equal": "at most {le}",
        "less_than": "less than {lt}",
        "literal_error": "{expected}",
        "finite_number": "a finite number",
        "int_parsing": "a whole number",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "int_parsing_size": "a smaller number",
        "float_parsing": "a number",
        "float_type": "a number",
        "bool_parsing": "true or false",
        "bool_type": "true or false",
        "string_type": "a text",
        "too_short": "one size or more",
        "too_long": "{max_length} sizes or fewer",
        "tuple_type": "sizes, as 200,200",
        "model_type": "a table",
    }
    if kind == "value_error":
        text = str(bounds["error"])
        return f"{called(name)} {text}, not {value!r}" if text.startswith("must") and name.count(".") else text
    if kind not in demands:
        return f"{called(name)}: {error['msg']}"
    return f"{called(name)} must be {demands[kind].format(**bounds)}, not {value if value != '' else repr(value)}"
