"""The run folder: what training leaves behind, self-sufficient, whole or not at all, known by its hashes.

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
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from unrolled import __version__
from unrolled.data.dataset import Dataset
from unrolled.errors import UnrolledError
from unrolled.files import sha256_of, write_whole
from unrolled.kernels.build import in_use
from unrolled.recipe import Recipe

ALWAYS_CHECKED = ("recipe.toml", "tokenizer.json")
_BEFORE_TRAINING = {*ALWAYS_CHECKED, "heldout.safetensors", "manifest.json", "last"}
FORMAT = 1
"""Raised when an older Unrolled could no longer read the folder."""


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
    """Raises UnrolledError where there is something at `path` already, but for what a broken-off start left there."""
    if not path.exists():
        return
    if not path.is_dir():
        raise UnrolledError(f"{path} is a file; choose another --out")
    names = {file.name for file in path.rglob("*")}
    if names and not ("recipe.toml" in names <= _BEFORE_TRAINING):
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
            "kernels": in_use(),
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
    """The records of a run folder, or of its `metrics.jsonl` alone; lines that a crash damaged are left out."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    records = []
    for line in file.read_bytes().split(b"\n") if file.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if _is_record(record)]


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not all(isinstance(record.get(name), int) for name in ("step", "epoch")):
        return False
    figures = (value for name, value in record.items() if name not in ("sample", "valid_protocol"))
    texts = (record.get(name, "") for name in ("sample", "valid_protocol"))
    return all(isinstance(value, int | float | None) for value in figures) and all(isinstance(t, str) for t in texts)


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
        if record["step"] <= step and ("nll_nats_per_token" in record or record["epoch"] < epoch)  # a step, or an epoch
    ]
    write_whole(path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept).encode())


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file that carries the SHA-256 of its tensors and metadata. What has two names is written twice."""
    written: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        written[name] = plain.clone() if plain.data_ptr() in places else plain
        places.add(plain.data_ptr())
    metadata = metadata | {"sha256": _sha256_of_tensors(written, metadata)}
    write_whole(path, safetensors.torch.save(written, metadata))


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
