"""The run folder: what training leaves behind, self-sufficient, whole or not at all, known by its hashes.

recipe.toml            every choice, resolved
tokenizer.json         text <-> ids; the `tokenizers` library reads it by itself
model.safetensors      the weights with the best validation
heldout.safetensors    the ids of valid and test, so that `evaluate` needs no corpus
metrics.jsonl          a line for every logged step and every epoch
manifest.json          provenance: versions, hardware, corpus and file hashes, time, results
last/                  the exact resume point and the one before it (training/resume.py), and copies of the small files
"""

import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from unrolled import __version__
from unrolled.data.dataset import Dataset
from unrolled.errors import UnrolledError
from unrolled.files import sha256_of, write_whole
from unrolled.metrics import finite
from unrolled.recipe import Recipe

ALWAYS_CHECKED = ("recipe.toml", "tokenizer.json")
COPIED = (*ALWAYS_CHECKED, "heldout.safetensors", "manifest.json")
"""What is kept twice, for `repair`."""
_BEFORE_TRAINING = {*COPIED, "last", "copies"}
_UNFINISHED = ".*.tmp"
FORMAT = 1
"""Raised when an older Unrolled could no longer read the folder."""
REPAIR = "unrolled repair RUN says what can be done"


def next_folder(name: str) -> Path:
    """`runs/NAME-N`, the first that does not exist."""
    numbers = (path.name.removeprefix(f"{name}-") for path in Path("runs").glob(f"{name}-*"))
    taken = [int(number) for number in numbers if re.fullmatch(r"[0-9]{1,9}", number)]
    return Path("runs") / f"{name}-{max(taken, default=0) + 1}"


def reserve(name: str) -> Path:
    """`next_folder`, made, so that nobody else takes it."""
    while True:
        path = next_folder(name)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path


def latest_folder(name: str) -> Path | None:
    """The newest `runs/NAME-N` that there is."""
    folder = next_folder(name)
    number = int(folder.name.rpartition("-")[2]) - 1
    return folder.with_name(f"{name}-{number}") if number else None


def refuse_taken(path: Path) -> None:
    """Raises UnrolledError where there is something at `path` already, but for what a broken-off start left there."""
    if not path.exists():
        return
    if not path.is_dir():
        raise UnrolledError(f"{path} is a file; choose another --out")
    names = set[str]()
    for file in path.rglob("*"):
        if not file.match(_UNFINISHED):
            names.add(file.name)
        if not names <= _BEFORE_TRAINING:  # which is enough to know
            break
    if names and not ("last" in names <= _BEFORE_TRAINING):
        raise UnrolledError(f"{path} exists already; choose another --out, or go on with it: --resume --out {path}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within it no other process trains into this folder; however a process ends, the system lets go of its lock.

    Raises:
        UnrolledError: another does.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    path.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UnrolledError(f"another process is training into {path}; wait for its end, or stop it") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def sweep(path: Path) -> None:
    """Takes away what a kill within a write left; only within `locked`."""
    for file in path.rglob(_UNFINISHED):
        file.unlink(missing_ok=True)


def create(path: Path, recipe: Recipe, changes: dict[str, Any], dataset: Dataset, id: str, kernels: str) -> None:
    """A new run folder, with all but weights.

    Args:
        path: where; its folder may be there.
        recipe: what is trained.
        changes: what the user asked for beyond the recipe.
        dataset: its text.
        id: what the run's files are known by.
        kernels: the level of those that it is to run on, or none.

    Raises:
        UnrolledError: there is something at `path` already.
    """
    refuse_taken(path)
    (path / "last" / "copies").mkdir(parents=True, exist_ok=True)  # first, as what a broken-off start is known by
    _write_twice(path, "recipe.toml", recipe.to_toml().encode())
    _write_twice(path, "tokenizer.json", dataset.tokenizer.to_json().encode())
    heldout = {split: torch.from_numpy(np.array(dataset.ids[split])) for split in ("valid", "test")}
    _write_twice(path, "heldout.safetensors", tensors_file(heldout, {"run": id}))
    files = (*ALWAYS_CHECKED, "heldout.safetensors")
    manifest = {
        "format": FORMAT,
        "id": id,
        "status": "training",
        "recipe": recipe.name,
        "changes": changes,
        "seed": recipe.training.seed,
        "precision": recipe.training.precision,
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
            "kernels": kernels,
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": {name: sha256_of(path / name) for name in files},
    }
    write_manifest(path, manifest)


def reopen(path: Path, recipe: Recipe, changes: dict[str, Any], kernels: str) -> None:
    """A run folder is to be trained on, perhaps with other values than before; its results no longer hold."""
    manifest = read_manifest(path) | {"status": "training"}
    manifest["changes"] = manifest["changes"] | changes
    before = manifest["versions"].get("kernels")
    if before is not None and before.split(", then ")[-1] != kernels:
        manifest["versions"] |= {"kernels": f"{before}, then {kernels}"}
    manifest.pop("results", None)
    manifest["files"].pop("recipe.toml", None)  # for a moment, lest a break between two writes look like damage
    write_manifest(path, manifest)
    _write_twice(path, "recipe.toml", recipe.to_toml().encode())
    manifest["files"]["recipe.toml"] = sha256_of(path / "recipe.toml")
    write_manifest(path, manifest)


def check_files(path: Path, manifest: dict[str, Any]) -> None:
    """Recipe and tokenizer against their hashes.

    Raises:
        UnrolledError: one is missing, damaged or changed.
    """
    for name in ALWAYS_CHECKED:
        check_file(path / name, manifest)


def check_file(file: Path, manifest: dict[str, Any]) -> None:
    """A file of a run folder against its hash, where the manifest has one.

    Raises:
        UnrolledError: it is missing, damaged or changed.
    """
    if not file.is_file():
        raise UnrolledError(f"{file} is missing; {REPAIR}")
    expected = manifest["files"].get(file.name)
    if expected is not None and sha256_of(file) != expected:
        raise UnrolledError(f"{file} is damaged or was changed: its SHA-256 is not the manifest's; {REPAIR}")


def _write_twice(path: Path, name: str, content: bytes) -> None:
    write_whole(path / name, content)
    write_whole(path / "last" / "copies" / name, content)


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """`manifest.json`, with the hash of all the rest of it as its last line."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    content = finite(content)
    content["sha256"] = _sha256_of_json(content)
    _write_twice(path, "manifest.json", (json.dumps(content, indent=2) + "\n").encode())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        UnrolledError: this is no run folder, a damaged one, or one of a newer Unrolled.
    """
    if not path.is_dir():
        raise UnrolledError(f"no run folder {str(path)!r}")
    if not (path / "manifest.json").is_file():
        if (path / "last" / "copies" / "manifest.json").is_file():
            raise UnrolledError(f"{path / 'manifest.json'} is missing; {REPAIR}")
        raise UnrolledError(f"{path} is not a run folder: it holds no manifest.json")
    return read_manifest_file(path / "manifest.json")


def read_manifest_file(file: Path) -> dict[str, Any]:
    """A manifest by its own path.

    Raises:
        UnrolledError: it is damaged, or of a newer Unrolled.
    """
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        expected = manifest.pop("sha256")
        newer = manifest["format"] > FORMAT
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UnrolledError(f"{file} is damaged; {REPAIR}") from error
    if newer:
        raise UnrolledError(f"{file} was made by a newer Unrolled (format {manifest['format']}); upgrade this one")
    if _sha256_of_json(manifest) != expected:
        raise UnrolledError(f"{file} is damaged or was changed: its hash does not fit; {REPAIR}")
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UnrolledError(f"{file} is not one of ours: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from error
    return manifest


class _Part(BaseModel):
    """Of a manifest: what must be there, and of what type. What else is there is left alone."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Split(_Part):
    tokens: int
    unknown: int
    sha256: str


class _Corpus(_Part):
    name: str
    note: str
    prepared: str
    splits: dict[str, _Split]


class _Figures(_Part):
    protocol: str
    tokens: int
    perplexity: float | None
    bits_per_character: float | None


class _Evaluated(_Figures):
    teacher_forced: dict[str, float | None] | None = None


class _Results(_Part):
    best_epoch: int
    train_perplexity: float | None
    valid_perplexity: float | None
    valid_protocol: str
    valid: _Evaluated
    test: _Evaluated


class _Manifest(_Part):
    format: int
    status: Literal["training", "stopped", "done"]
    recipe: str
    changes: dict[str, str | int | float | bool | list[int]]
    seed: int
    corpus: _Corpus
    versions: dict[str, str]
    started: str
    files: dict[str, str]
    id: str | None = None
    epochs: int = 0
    training_s: float = 0.0
    hardware: dict[str, str | int] = {}
    results: _Results | None = None


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], previous: Path | None = None
) -> None:
    """A safetensors file that carries the SHA-256 of its tensors and metadata; what it replaces becomes `previous`."""
    write_whole(path, tensors_file(tensors, metadata), previous)


def tensors_file(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """What `write_tensors` writes. What has two names is written twice."""
    written: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        written[name] = plain.clone() if plain.data_ptr() in places else plain
        places.add(plain.data_ptr())
    metadata = metadata | {"sha256": _sha256_of_tensors(written, metadata)}
    return safetensors.torch.save(written, metadata)


def read_tensors(path: Path, id: str | None = None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What `write_tensors` wrote: tensors and metadata.

    Args:
        path: the file.
        id: of the run that it must be of; None for any.

    Raises:
        UnrolledError: the file is missing, not whole, or of another run.
    """
    if not path.is_file():
        raise UnrolledError(f"{path} is missing; {REPAIR}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise UnrolledError(f"{path} is damaged: {str(error).splitlines()[0]}; {REPAIR}") from error
    expected = metadata.pop("sha256", None)
    if _sha256_of_tensors(tensors, metadata) != expected:
        raise UnrolledError(f"{path} is damaged: its content does not fit its hash; {REPAIR}")
    if id is not None and metadata.get("run") != id:
        raise UnrolledError(f"{path} is of another run; {REPAIR}")
    return tensors, metadata


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
