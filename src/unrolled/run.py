"""What training leaves behind: the run folder, self-sufficient, every file whole or not at all and known by its hash.

recipe.toml            every choice, resolved
tokenizer.json         text <-> ids; the `tokenizers` library reads it by itself
model.safetensors      the weights with the best validation
heldout.safetensors    the ids of valid and test, so that `evaluate` needs no corpus
metrics.jsonl          a line for every logged step and every epoch
manifest.json          provenance: versions, hardware, corpus and file hashes, time, results
last/                  the exact resume point (training/resume.py)
"""

import hashlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import safetensors
import safetensors.torch
import torch

from unrolled import __version__
from unrolled.data.batches import Windows
from unrolled.data.dataset import Dataset, prepare_with
from unrolled.data.text import SPLITS, open_corpus, open_text, text_is_there
from unrolled.data.tokens import Tokenizer
from unrolled.errors import UnrolledError
from unrolled.files import sha256_of, write_whole
from unrolled.inference.evaluate import Evaluation, evaluate_exact, evaluate_paper
from unrolled.nn.cells import CELLS
from unrolled.nn.loss import bits_per
from unrolled.nn.model import LanguageModel
from unrolled.recipe import Model, Recipe, load_recipe

if TYPE_CHECKING:
    from unrolled.inference.generate import Prediction
    from unrolled.inference.score import Score

ALWAYS_CHECKED = ("recipe.toml", "tokenizer.json")
FORMAT = 1
"""Raised when an older Unrolled could no longer read the folder."""


@final
class Run:
    """A trained model, ready for use. Made by `unrolled.load`; needs the folder alone."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.path = path
        self.folder = path.resolve()
        self.manifest = read_manifest(path)
        self.device = pick_device(device)
        check_files(path, self.manifest)
        self.recipe = load_recipe(path / "recipe.toml")
        self.tokenizer = Tokenizer.load(path / "tokenizer.json")

    def __repr__(self) -> str:
        return (
            f"<unrolled.Run {str(self.path)!r}: {self.recipe.name}, {len(self.tokenizer):,} {self.recipe.data.tokens}s>"
        )

    @cached_property
    def model(self) -> LanguageModel:
        """The network with its best weights, in evaluation mode."""
        path = self.folder / "model.safetensors"
        if not path.is_file():
            raise UnrolledError(f"{path} is missing; the training has not come so far: unrolled train --resume")
        tensors, _ = read_tensors(path)
        model = build_model(self.recipe.model, len(self.tokenizer))
        _load_weights(model, tensors, path)
        return model.to(self.device).eval()

    def predict(self, prefix: str = "", k: int = 10, unknown: bool = False) -> "Prediction":
        """The k likeliest next tokens after `prefix`, with the model's probabilities; `<unk>` only if asked for."""
        from unrolled.inference.generate import predict

        return predict(self.model, self.tokenizer, prefix, k, unknown)

    def generate(self, prompt: str = "", **options: Any) -> str:
        """`prompt` continued; the options are `stream`'s."""
        return "".join(self.stream(prompt, **options))

    def stream(self, prompt: str = "", **options: Any) -> Iterator[str]:
        """Pieces of text that continue `prompt`, as they are drawn.

        Options: length (tokens), temperature, top_k, top_p, seed, unknown; see `inference.generate.generate`.
        """
        from unrolled.inference.generate import generate

        return generate(self.model, self.tokenizer, prompt, **options)

    def score(self, text: str) -> "Score":
        """How probable a text is: log-probability of every token, their sum, perplexity."""
        from unrolled.inference.score import score

        return score(self.model, self.tokenizer, text)

    def evaluate(
        self, split: str = "test", protocol: str = "exact", data: str | None = None, encoding: str | None = None
    ) -> dict[str, Any]:
        """Perplexity of a split, or of other text, as what `unrolled evaluate --json` prints.

        Args:
            split: train, valid or test; `data` that is one text file is taken whole.
            protocol: "exact" or "paper"; the reference's paper protocol on test is exact.
            data: another corpus, file, folder, archive or `-`; None takes what the model was trained with.
            encoding: of `data`; None is UTF-8.

        Raises:
            UnrolledError: no such split or protocol, or the text is not to be had.
        """
        if protocol not in ("exact", "paper"):
            raise UnrolledError(f"no protocol {protocol!r}; it is exact or paper")
        corpus, split, ids = self._ids(split, data, encoding)
        if len(ids) < 2:
            raise UnrolledError(f"{corpus} holds {len(ids)} token; an evaluation takes two or more")
        training = self.recipe.training
        if protocol == "paper" and split != "test":
            windows = Windows(ids, training.batch_size, training.num_steps)
            result, counted = evaluate_paper(self.model, windows), windows.targets.ravel()
        else:
            result, counted = evaluate_exact(self.model, ids), ids[1:]
        described = describe(result, self.tokenizer.characters(counted))
        return {"run": str(self.path), "corpus": corpus, "split": split} | described | {"protocol": protocol}

    def _ids(self, split: str, data: str | None, encoding: str | None) -> tuple[str, str, np.ndarray]:
        """What the ids are of: the corpus, the split; and the ids."""
        if data is None and split not in SPLITS:
            raise UnrolledError(f"no split {split!r}; there are " + ", ".join(SPLITS))
        if data is None and split != "train":
            path = self.folder / "heldout.safetensors"
            if not path.is_file():
                raise UnrolledError(f"{path} was taken away; pass the text with --data")
            if sha256_of(path) != self.manifest["files"][path.name]:
                raise UnrolledError(f"{path} is damaged or was changed: its SHA-256 is not the manifest's")
            tensors, _ = read_tensors(path)
            return self.manifest["corpus"]["name"], split, tensors[split].numpy()
        encoding = (encoding or "utf-8") if data is not None else self.recipe.data.encoding
        encoding = None if self.tokenizer.unit == "byte" else encoding
        if data is None and not text_is_there(self.recipe.data.corpus):
            raise UnrolledError(
                f"the text that {self.path} was trained on, {self.recipe.data.corpus!r}, is no longer here; "
                "pass it with --data"
            )
        whole = open_text(data, encoding) if data is not None else None
        corpus = whole or open_corpus(data or self.recipe.data.corpus, encoding)
        dataset = prepare_with(corpus, self.tokenizer)
        split = "text" if whole else split
        if split not in dataset.ids:
            raise UnrolledError(f"no split {split!r}; there are " + ", ".join(dataset.ids))
        expected = self.manifest["corpus"]["splits"].get(split, {}).get("sha256")
        if data is None and dataset.splits[split].sha256 != expected:
            raise UnrolledError(f"{corpus.name} has changed since the training; pass it with --data to evaluate it so")
        return corpus.name, split, dataset.ids[split]


def load(path: str | os.PathLike[str], device: str = "cpu") -> Run:
    """Opens a run folder for use, from anywhere, with no corpus and no recipe beside it.

    Args:
        path: the folder that training left.
        device: "cpu", "cuda", "cuda:1", or "auto" for a GPU where there is one.

    Raises:
        UnrolledError: it is no run folder, a file of it is missing, damaged or of a newer format, or there is no such
            device.
    """
    return Run(Path(path), device)


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
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
            raise RuntimeError(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UnrolledError(f"no device {name!r} here; --device cpu, or auto to take what there is") from error
    return device


def num_parameters(model: Model, vocab_size: int) -> int:
    """How many numbers the network of a recipe learns, without building it."""
    sizes = [model.embedding_size, *model.hidden_sizes]
    layers = sum(CELLS[model.cell].gates * h * (e + h + 1) for e, h in pairwise(sizes))
    return vocab_size * (model.embedding_size + sizes[-1] + 1) + layers


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
    return LanguageModel(
        vocab_size,
        model.embedding_size,
        model.hidden_sizes,
        cell=model.cell,
        dropout=model.dropout,
        init_scale=model.init_scale,
        forget_bias=model.forget_bias,
    )


# ------------------------------------------------------------------------------------------------ writing


def next_folder(name: str) -> Path:
    """`runs/NAME-N`, the first that does not exist."""
    numbers = (path.name.removeprefix(f"{name}-") for path in Path("runs").glob(f"{name}-*"))
    taken = [int(number) for number in numbers if re.fullmatch(r"[0-9]{1,9}", number)]
    return Path("runs") / f"{name}-{max(taken, default=0) + 1}"


def latest_folder(name: str) -> Path | None:
    """The newest `runs/NAME-N` that there is."""
    folder = next_folder(name)
    number = int(folder.name.rpartition("-")[2]) - 1
    return folder.with_name(f"{name}-{number}") if number else None


def refuse_taken(path: Path) -> None:
    """Raises UnrolledError where there is something at `path` already."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UnrolledError(f"{path} exists already; choose another --out, or go on with it: --resume --out {path}")


def create(path: Path, recipe: Recipe, changes: dict[str, Any], dataset: Dataset) -> None:
    """A new run folder, with all but weights. `changes` are what the user asked for beyond the recipe.

    Raises:
        UnrolledError: there is something at `path` already.
    """
    refuse_taken(path)
    path.mkdir(parents=True, exist_ok=True)
    write_whole(path / "recipe.toml", recipe.to_toml().encode())
    write_whole(path / "tokenizer.json", dataset.tokenizer.to_json().encode())
    heldout = {split: torch.from_numpy(np.array(dataset.ids[split])) for split in ("valid", "test")}
    write_tensors(path / "heldout.safetensors", heldout, {})
    files = (*ALWAYS_CHECKED, "heldout.safetensors")
    manifest = {
        "format": FORMAT,
        "status": "training",
        "recipe": recipe.name,
        "changes": changes,
        "seed": recipe.training.seed,
        "corpus": {
            "name": dataset.name,
            "note": dataset.note,
            "prepared": dataset.key,
            "splits": {split: vars(info) for split, info in dataset.splits.items()},
        },
        "vocab_size": len(dataset.tokenizer),
        "versions": {
            "unrolled": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": {name: sha256_of(path / name) for name in files},
    }
    write_manifest(path, manifest)


def reopen(path: Path, recipe: Recipe, changes: dict[str, Any]) -> None:
    """A run folder is to be trained on, perhaps with other values than before; its results no longer hold."""
    manifest = read_manifest(path) | {"status": "training"}
    manifest["changes"] = manifest["changes"] | changes
    manifest.pop("results", None)
    manifest["files"].pop("recipe.toml")  # for a moment, lest a break between two writes look like damage
    write_manifest(path, manifest)
    write_whole(path / "recipe.toml", recipe.to_toml().encode())
    manifest["files"]["recipe.toml"] = sha256_of(path / "recipe.toml")
    write_manifest(path, manifest)


def check_files(path: Path, manifest: dict[str, Any]) -> None:
    """Recipe and tokenizer against their hashes.

    Raises:
        UnrolledError: one is missing, damaged or changed.
    """
    for name in ALWAYS_CHECKED:
        expected = manifest["files"].get(name)
        if _hash_or_refuse(path / name) != expected and expected is not None:
            raise UnrolledError(f"{path / name} is damaged or was changed: its SHA-256 is not the manifest's")


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """`manifest.json`, with the hash of all the rest of it as its last line."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    content = finite(content)
    content["sha256"] = _sha256_of_json(content)
    write_whole(path / "manifest.json", (json.dumps(content, indent=2) + "\n").encode())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        UnrolledError: this is no run folder, a damaged one, or one of a newer Unrolled.
    """
    if not path.is_dir():
        raise UnrolledError(f"no run folder {str(path)!r}")
    file = path / "manifest.json"
    if not file.is_file():
        raise UnrolledError(f"{path} is not a run folder: it holds no manifest.json")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        expected = manifest.pop("sha256")
        newer = manifest["format"] > FORMAT
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UnrolledError(f"{file} is damaged") from error
    if newer:
        raise UnrolledError(f"{path} was made by a newer Unrolled (format {manifest['format']}); upgrade this one")
    if _sha256_of_json(manifest) != expected:
        raise UnrolledError(f"{file} is damaged or was changed: its hash does not fit")
    return manifest


def append_metrics(path: Path, record: dict[str, Any]) -> None:
    """One more line of `metrics.jsonl`."""
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(record)) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`; lines that a crash cut short or damaged are left out."""
    file = path / "metrics.jsonl"
    records = []
    for line in file.read_bytes().split(b"\n") if file.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict) and "step" in record]


def finite(value: Any) -> Any:
    """The same with None for what JSON has no number for: infinity, NaN."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_metrics(path: Path, step: int, epoch: int) -> None:
    """Takes away what was recorded after `step` of `epoch`, before going on from there."""
    kept = [
        record
        for record in read_metrics(path)
        if record["step"] <= step and ("valid_perplexity" not in record or record["epoch"] < epoch)
    ]
    write_whole(path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept).encode())


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file that carries the SHA-256 of its tensors and metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = metadata | {"sha256": _sha256_of_tensors(tensors, metadata)}
    write_whole(path, safetensors.torch.save(tensors, metadata))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What `write_tensors` wrote: tensors and metadata.

    Raises:
        UnrolledError: the file is not whole.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise UnrolledError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    expected = metadata.pop("sha256", None)
    if _sha256_of_tensors(tensors, metadata) != expected:
        raise UnrolledError(f"{path} is damaged: its content does not fit its hash")
    return tensors, metadata


def _load_weights(model: LanguageModel, tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UnrolledError(f"{path} does not fit the recipe beside it") from error


def _hash_or_refuse(path: Path) -> str:
    if not path.is_file():
        raise UnrolledError(f"{path} is missing")
    return sha256_of(path)


def _sha256_of_json(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256_of_tensors(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine, as results name it."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(_values(file, "model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _values(lines: Iterable[str], key: str) -> Iterator[str]:
    return (line.partition(":")[2].strip() for line in lines if line.startswith(key))
