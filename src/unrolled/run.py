"""A trained model in use: `unrolled.load`; and the network that a recipe describes, where it fits."""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch

from unrolled.data.batches import Windows
from unrolled.data.dataset import find_prepared, prepare_with
from unrolled.data.text import SPLITS, open_corpus, open_text, text_is_there
from unrolled.data.tokens import Tokenizer
from unrolled.errors import UnrolledError
from unrolled.folder import check_file, check_files, read_manifest, read_tensors
from unrolled.inference.evaluate import Evaluation, evaluate_exact, evaluate_paper
from unrolled.kernels import build
from unrolled.nn.cells import CELLS
from unrolled.nn.loss import bits_per
from unrolled.nn.model import LanguageModel
from unrolled.recipe import Model, load_recipe

if TYPE_CHECKING:
    from unrolled.inference.generate import Prediction
    from unrolled.inference.score import Score, Scorer
    from unrolled.inference.session import Session


@final
class Run:
    """A trained model, ready for use. Made by `unrolled.load`; needs the folder alone."""

    def __init__(self, path: Path, device: str = "cpu", precision: str = "f32") -> None:
        if precision not in ("f32", "bf16"):
            raise UnrolledError(f"no precision {precision!r}; it is f32 or bf16")
        self.path = path
        self.precision = precision
        self.folder = path.resolve()
        self.manifest = read_manifest(path)
        self.device = pick_device(device)
        check_files(path, self.manifest)
        self.recipe = load_recipe(path / "recipe.toml")
        self.tokenizer = Tokenizer.load(path / "tokenizer.json")

    def __reduce__(self) -> "tuple[type[Run], tuple[Path, str, str]]":
        """To another process, or a copy: opened again from its folder."""
        return Run, (self.folder, str(self.device), self.precision)

    def __repr__(self) -> str:
        return (
            f"<unrolled.Run {str(self.path)!r}: {self.recipe.name}, {len(self.tokenizer):,} {self.recipe.data.tokens}s>"
        )

    def _repr_html_(self) -> str:
        from unrolled.inference.shown import table_html

        results = self.manifest.get("results", {})
        found = [(split, results[split]["perplexity"]) for split in ("valid", "test") if split in results]
        rows = [
            ("recipe", self.recipe.name),
            ("corpus", str(self.manifest["corpus"]["name"])),
            ("vocabulary", f"{len(self.tokenizer):,} {self.recipe.data.tokens}s"),
            ("parameters", f"{num_parameters(self.recipe.model, len(self.tokenizer)):,}"),
            *((f"{split} perplexity", "–" if figure is None else f"{figure:.2f}") for split, figure in found),
            ("status", str(self.manifest["status"])),
        ]
        return table_html(str(self.path), rows)

    @cached_property
    def model(self) -> LanguageModel:
        """The network with its best weights, in evaluation mode."""
        path = self.folder / "model.safetensors"
        if not path.is_file():
            raise UnrolledError(f"{path} is missing; if the training has not come so far, unrolled train --resume")
        tensors, _ = read_tensors(path, self.manifest.get("id"))
        with torch.random.fork_rng([]):  # what is drawn for a model that is overwritten is nobody's loss
            model = build_model(self.recipe.model, len(self.tokenizer))
        _load_weights(model, tensors, path)
        return model.to(self.device).eval()

    def predict(self, prefix: str = "", k: int = 10, unknown: bool = False, complete: bool = False) -> "Prediction":
        """The k likeliest next tokens after `prefix`, with the model's probabilities; `<unk>` only if asked for.

        With `complete`, the words that the last word of `prefix`, which is still being typed, may become.
        """
        (found,) = self.predict_many([prefix], k, unknown, complete)
        return found

    def predict_many(
        self, prefixes: Sequence[str], k: int = 10, unknown: bool = False, complete: bool = False
    ) -> "list[Prediction]":
        """`predict` of each, side by side."""
        from unrolled.inference.generate import predict_many

        with self.rounded():
            return predict_many(self.model, self.tokenizer, prefixes, k, unknown, complete)

    def continuations(self, prefix: str = "", length: int = 3, k: int = 5, **options: Any) -> list[tuple[str, float]]:
        """The k likeliest texts of `length` tokens after `prefix`, with their log-probabilities, by beam search.

        Options: width, unknown; see `inference.generate.continuations`.
        """
        from unrolled.inference.generate import continuations

        with self.rounded():
            return continuations(self.model, self.tokenizer, prefix, length, k, **options)

    def session(self, text: str = "") -> "Session":
        """A text that grows: `read` more of it, and `predict` what comes next after each word for one step.

        Each holds the weights once more, as the kernels read them; who keeps hundreds of texts asks `unrolled serve`.
        """
        from unrolled.inference.session import Session

        return Session(self.model, self.tokenizer, text, rounded=self.precision == "bf16")

    def generate(self, prompt: str = "", **options: Any) -> str:
        """`prompt` continued; the options are `stream`'s."""
        return "".join(self.stream(prompt, **options))

    def stream(self, prompt: str = "", **options: Any) -> Iterator[str]:
        """Pieces of text that continue `prompt`, as they are drawn.

        Options: length (tokens), seed, stop, random_start, and what `inference.sampling.Sampling` takes: temperature,
        top_k, top_p, min_p, repetition_penalty, banned, unknown.
        """
        from unrolled.inference.generate import generate

        with self.rounded():
            return generate(self.model, self.tokenizer, prompt, **options)

    def generate_many(self, prompt: str = "", samples: int = 2, **options: Any) -> list[str]:
        """Several texts that continue `prompt`, drawn side by side; the options are `stream`'s."""
        from unrolled.inference.generate import generate_many

        with self.rounded():
            return generate_many(self.model, self.tokenizer, prompt, samples, **options)

    def score(self, text: str, **options: Any) -> "Score":
        """How probable a text is: log-probability of every token, their sum, perplexity.

        Options: begin, end, unknown, most_tokens; see `inference.score.Scorer`.
        """
        return self.scorer(**options).score(text)

    def score_many(self, texts: Sequence[str], **options: Any) -> "list[Score | UnrolledError]":
        """`score` of each, side by side and so much faster; an error stands in the place of what cannot be scored."""
        return self.scorer(**options).score_many(texts)

    def scorer(self, **options: Any) -> "Scorer":
        """What scores text after text, or the lines of a document each with all before it as its context."""
        from unrolled.inference.score import Scorer

        return Scorer(self.model, self.tokenizer, rounded=self.precision == "bf16", **options)

    def rounded(self) -> torch.autocast:
        """Within it products are of bf16, where that is this run's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def evaluate(
        self, split: str = "test", protocol: str = "exact", data: str | None = None, encoding: str | None = None
    ) -> dict[str, Any]:
        """Perplexity of a split, or of other text, as what `unrolled evaluate --json` prints.

        Args:
            split: train, valid or test; `data` that is one text file is taken whole.
            protocol: "exact" or "paper"; the reference's paper protocol on test is exact.
            data: another corpus, file, folder, archive or `-`; None takes what the model was trained with.
            encoding: of `data`; None is UTF-8.

        Returns:
            The figures by name. A Jordan network goes by its own output; what it makes of the text when it is fed the
            true previous token stands under "teacher_forced".

        Raises:
            UnrolledError: no such split or protocol, or the text is not to be had.
        """
        if protocol not in ("exact", "paper"):
            raise UnrolledError(f"no protocol {protocol!r}; it is exact or paper")
        if encoding is not None and data is None:
            raise UnrolledError("an encoding is of other text; pass it with --data")
        corpus, split, ids = self._ids(split, data, encoding)
        if len(ids) < 2:
            raise UnrolledError(f"{corpus} holds {len(ids)} token; an evaluation takes two or more")
        training = self.recipe.training
        windows = None
        if protocol == "paper" and split != "test":
            streams, steps = training.batch_size, training.num_steps
            if len(ids) // streams <= steps:
                raise UnrolledError(
                    f"{corpus} holds {len(ids):,} tokens, which are too few for the paper protocol of this model, "
                    f"{streams} streams in windows of {steps} steps; exact takes any text"
                )
            windows = Windows(ids, streams, steps)
        counted = ids[1:] if windows is None else windows.targets.ravel()
        characters = self.tokenizer.characters(counted)
        unknown = 0 if self.tokenizer.unknown_id is None else int((counted == self.tokenizer.unknown_id).sum())

        def figures(teacher_forced: bool) -> dict[str, Any]:
            with self.rounded():
                if windows is not None:
                    return describe(evaluate_paper(self.model, windows, teacher_forced), characters)
                return describe(evaluate_exact(self.model, ids, teacher_forced=teacher_forced), characters)

        answer: dict[str, Any] = {"run": str(self.path), "corpus": corpus, "split": split, "unknown": unknown}
        answer |= figures(False) | {"protocol": protocol, "precision": self.precision}
        if self.model.feeds_back_output:
            names = ("nll_nats", "perplexity", "bits_per_token", "bits_per_character")
            forced = figures(True)
            answer["teacher_forced"] = {name: forced[name] for name in names}
        return answer

    def export(self, path: str | os.PathLike[str] | None = None, int8: bool = False) -> dict[str, Any]:
        """Writes the model, tokenizer and all, as one ONNX file for programs without PyTorch; see `export.export`.

        What ONNX Runtime makes of the file is compared with the model first, on the beginning of valid, or, where
        the held-out ids were taken away, on tokens drawn at random.

        Args:
            path: the file, NAME.onnx; None is model.onnx, or model-int8.onnx, in the run folder.
            int8: a quarter of the size: weights rounded to 8 bits, row by row.

        Returns:
            The file, its size, the names and shapes of what goes in and comes out, how far apart the two are.

        Raises:
            UnrolledError: onnx or onnxruntime is missing, or the file would not do what the model does.
        """
        try:
            from unrolled.export import export
        except ImportError as error:
            raise UnrolledError("an ONNX file needs onnx and onnxruntime: pip install 'unrolled[export]'") from error
        held_out = (self.folder / "heldout.safetensors").is_file()
        ids, text = self._ids("valid", None, None)[2] if held_out else np.zeros(0), "valid"
        if len(ids) < 2:
            ids, text = np.random.default_rng(0).integers(0, len(self.tokenizer), 501), "random"
        file = Path(path) if path is not None else self.path / ("model-int8.onnx" if int8 else "model.onnx")
        return {"run": str(self.path), "checked_on": text} | export(self.model, self.tokenizer, file, ids, int8)

    def _ids(self, split: str, data: str | None, encoding: str | None) -> tuple[str, str, np.ndarray]:
        """What the ids are of: the corpus, the split; and the ids."""
        if data is None and split not in SPLITS:
            raise UnrolledError(f"no split {split!r}; there are " + ", ".join(SPLITS))
        if data is None and split != "train":
            path = self.folder / "heldout.safetensors"
            if not path.is_file():
                raise UnrolledError(f"{path} was taken away; pass the text with --data")
            check_file(path, self.manifest)
            ids = read_tensors(path)[0].get(split)
            kinds = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
            if ids is None or ids.dim() != 1 or ids.dtype not in kinds:
                raise UnrolledError(f"{path} holds no ids of {split}")
            if (ids.numpy() >= len(self.tokenizer)).any():
                raise UnrolledError(f"{path} holds ids that are not in the vocabulary of {len(self.tokenizer)}")
            return self.manifest["corpus"]["name"], split, ids.numpy()
        if data is None and (known := find_prepared(self.manifest["corpus"]["prepared"])) is not None:
            return self.manifest["corpus"]["name"], split, known.ids[split]
        encoding = (encoding or "utf-8") if data is not None else self.recipe.data.encoding
        encoding = None if self.tokenizer.unit == "byte" else encoding
        if data is None and not text_is_there(self.recipe.data.corpus):
            raise UnrolledError(
                f"the text that {self.path} was trained on, {self.recipe.data.corpus!r}, is no longer here; "
                "pass it with --data"
            )
        corpus = open_corpus(self.recipe.data.corpus, encoding) if data is None else open_text(data, encoding)
        dataset = prepare_with(corpus, self.tokenizer)
        split = "text" if "text" in corpus.splits else split
        if split not in dataset.ids:
            raise UnrolledError(f"no split {split!r}; there are " + ", ".join(dataset.ids))
        expected = self.manifest["corpus"]["splits"].get(split, {}).get("sha256")
        if data is None and dataset.splits[split].sha256 != expected:
            raise UnrolledError(f"{corpus.name} has changed since the training; pass it with --data to evaluate it so")
        return corpus.name, split, dataset.ids[split]


def load(path: str | os.PathLike[str], device: str = "cpu", precision: str = "f32") -> Run:
    """Opens a run folder for use, from anywhere, with no corpus and no recipe beside it.

    Its weights are read, and checked, when they are first asked for.

    Args:
        path: the folder that training left.
        device: "cpu", "cuda", "cuda:1", or "auto" for a GPU where there is one, whose layers cuDNN then multiplies in
            f32 and not in TF32, in the whole process.
        precision: "f32", or "bf16" for products of bf16, which shift a perplexity by some thousandths and are faster
            where the processor has them.

    Raises:
        UnrolledError: it is no run folder, a file of it is missing, damaged or of a newer format, or there is no such
            device or precision.
    """
    return Run(Path(path), device, precision)


def describe(result: Evaluation, characters: int) -> dict[str, Any]:
    """An evaluation with every figure that follows from it."""
    return {
        "protocol": result.protocol,
        "tokens": result.tokens,
        "nll_nats": result.nll_nats,
        "perplexity": result.perplexity,
        "bits_per_token": result.bits_per_token,
        "characters": characters,
        "bits_per_character": bits_per(result.nll_nats, characters) if characters else None,
    }


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one.

    Raises:
        UnrolledError: this PyTorch has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
            raise RuntimeError(name)
        torch.empty(0, device=device)
        if device.type == "cuda":
            # f32 is f32: PyTorch would have cuDNN multiply the layers in TF32
            torch.backends.cudnn.rnn.fp32_precision = "ieee"  # type: ignore[attr-defined]
    except (RuntimeError, AssertionError) as error:
        raise UnrolledError(f"no device {name!r} here; --device cpu, or auto to take what there is") from error
    return device


def num_parameters(model: Model, vocab_size: int) -> int:
    """How many numbers the network of a recipe learns, without taking the memory for them."""
    with torch.device("meta"):
        return _network(model, vocab_size).num_parameters()


def refuse_what_cannot_fit(needed: int) -> None:
    """Before it is allocated.

    Raises:
        UnrolledError: the machine has less than `needed` bytes of memory.
    """
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > there:
        raise UnrolledError(
            f"this takes {needed / 2**30:,.1f} GiB of memory or more, and the machine has {there / 2**30:,.1f}; lower "
            "--model.hidden-sizes, --model.embedding-size, --data.vocab-size or --training.batch-size"
        )


def build_model(model: Model, vocab_size: int) -> LanguageModel:
    """The network that a recipe describes, its parameters drawn from torch's global generator.

    Raises:
        UnrolledError: it does not fit in memory.
    """
    refuse_what_cannot_fit(4 * num_parameters(model, vocab_size))
    build.library()  # has the memory in large pages from then on, where the weights should lie
    return _network(model, vocab_size).float()  # whatever PyTorch's default is


def _network(model: Model, vocab_size: int) -> LanguageModel:
    return LanguageModel(
        vocab_size,
        model.embedding_size,
        model.hidden_sizes,
        cell=model.cell,
        dropout=model.dropout,
        init_scale=model.init_scale,
        tie_weights=model.tie_weights,
        draw_decoder_bias=model.draw_decoder_bias,
        draw_layer_biases=model.draw_layer_biases,
        **{name: getattr(model, name) for name in CELLS[model.cell].options},
    )


def _load_weights(model: LanguageModel, tensors: dict[str, torch.Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise UnrolledError(f"{path}: {name} is not of finite numbers in f32")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UnrolledError(f"{path} does not fit the recipe beside it") from error
