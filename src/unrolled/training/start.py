"""What is settled before the first step: text, precision, memory, and what a resumed training goes on with."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unrolled import folder
from unrolled.data.dataset import Dataset, find_prepared, prepare
from unrolled.data.text import KNOWN, open_corpus, text_is_there
from unrolled.data.tokens import Vocabulary
from unrolled.errors import UnrolledError
from unrolled.kernels import build
from unrolled.kernels.ops import FEW_WORDS
from unrolled.nn import rounding
from unrolled.recipe import FIELDS, Recipe, load_recipe
from unrolled.run import num_parameters
from unrolled.training.distributed import Ranks
from unrolled.training.resume import can_resume

Progress = Callable[[dict[str, Any]], object]
"""Told of everything worth knowing as it happens: {"event": "note" | "step" | "epoch", …}."""

MAY_CHANGE = (
    "training.max_epochs",
    "training.save_every",
    "training.save_every_s",
    "training.sample_every",
    "training.device",
    "data.corpus",
)
"""What a resumed training may have otherwise than before; that the text is the same is seen from its hash."""


def make_dataset(recipe: Recipe, progress: Progress) -> Dataset:
    data = recipe.data
    corpus = open_corpus(data.corpus, None if data.tokens == "byte" else data.encoding)
    dataset = prepare(corpus, Vocabulary(data.tokens, data.vocab_size, data.min_count, data.unknown))
    splits = f"{dataset.name}: " + ", ".join(f"{split} {info.tokens:,}" for split, info in dataset.splits.items())
    progress(
        note(f"{splits} tokens; vocabulary {len(dataset.tokenizer):,}" + (f"; {dataset.note}" * bool(dataset.note)))
    )
    valid = dataset.splits["valid"]
    if valid.unknown > 0.05 * valid.tokens:
        share = valid.unknown / valid.tokens
        way_out = "try --data.tokens bpe, or another --data.vocab-size or --data.min-count"
        progress(note(f"{share:.1%} of valid is <unk>, which makes every figure too good: {way_out}"))
    if valid.tokens < 2 or dataset.splits["test"].tokens < 2:
        raise UnrolledError(f"{dataset.name} is too short: valid and test take two tokens or more each")
    return dataset


def refuse_shares(recipe: Recipe, ranks: Ranks) -> None:
    """What cannot be shared out among so many processes."""
    ranks.streams(recipe.training.batch_size)
    if ranks.world > 1 and recipe.data.corpus == "-":
        raise UnrolledError(f"standard input reaches one process, not {ranks.world}; name a file with --data")


def identity(recipe: Recipe, dataset: Dataset) -> str:
    """What a run's files are known by: the recipe as it began, and the text. Who shares it comes to the same bits."""
    fixed = {name: recipe.value(name) for name in FIELDS if name != "data.corpus"}
    return hashlib.sha256(json.dumps([fixed, dataset.key], sort_keys=True).encode()).hexdigest()[:32]


def settle_precision(asked: str, device: torch.device) -> str:
    """What `auto` comes to here: bf16 where what runs, the kernels or PyTorch alone, has the processor multiply it."""
    if asked != "auto":
        return asked
    alone = build.processor_multiplies_bf16() and rounding.is_native()
    native = build.multiplies_bf16() if build.library() is not None else alone
    return "bf16" if device.type == "cpu" and native else "f32"


def kernels_on(device: torch.device) -> str:
    """The level of the kernels that a training on this device runs on, or none."""
    return build.in_use() if device.type == "cpu" else "none"


def say_kernels(path: Path, device: torch.device, recipe: Recipe, progress: Progress) -> None:
    """Which kernels run, what would make it faster, and whether a resumed training began with others."""
    precision, cell = recipe.training.precision, recipe.model.cell
    used, before = kernels_on(device), folder.read_manifest(path)["versions"].get("kernels")
    if device.type != "cpu":
        progress(note(f"{precision}, on PyTorch's own layers for a GPU"))
    elif not build.levels():
        progress(note(f"{precision}, on PyTorch alone: UNROLLED_KERNELS is off"))
    elif used == "none":
        progress(note(f"{precision}, on PyTorch alone; unrolled kernels build makes this faster"))
    else:
        but = "" if cell in ("lstm", "gru", "elman") else f", but for its {cell} layer, which runs on PyTorch alone"
        better = f"; unrolled kernels build tries those for {best}" if (best := build.levels()[0]) != used else ""
        progress(note(f"{precision}, on the {used} kernels{but}{better}"))
    if device.type == "cpu" and precision == "bf16" and not build.processor_multiplies_bf16():
        progress(note("this processor has no instruction for bf16; --precision f32 is faster, and rounds less"))
    if before not in (None, used):
        progress(note(f"the kernels of this run were {before}: it goes on, but not bit for bit"))


def located(data: str) -> str:
    """A path that holds from any folder; a name as it is."""
    refuse_undecodable(data)
    is_path = data not in ("", "-", *KNOWN) and Path(data).exists()
    return str(Path(data).resolve()) if is_path else data


def refuse_undecodable(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UnrolledError(f"the name {name!r} is not UTF-8; rename the file") from error


def resumed(recipe: Recipe | str | Path | None, out: str | Path | None, changes: dict[str, Any]) -> tuple[Recipe, Path]:
    """The recipe and folder to go on with; refused where the recipe asks for something else than was begun."""
    asked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe) if recipe is not None else None
    path = Path(out) if out is not None else folder.latest_folder(asked.name if asked else "demo")
    if path is None or not can_resume(path):
        where = f"{path} holds" if path else "the folder runs holds"
        raise UnrolledError(f"{where} nothing to resume; --out names the run folder to go on with")
    manifest = folder.read_manifest(path)
    folder.check_files(path, manifest)
    saved = load_recipe(path / "recipe.toml")
    wanted = (asked.changed(manifest["changes"]) if asked else saved).changed(changes)
    if wanted.training.precision == "auto":
        wanted = wanted.changed({"training.precision": saved.training.precision})
    different = [name for name in wanted.differences(saved) if name not in MAY_CHANGE]
    if different:
        raise UnrolledError(f"{path} was begun with other values of {', '.join(different)}; resume without them")
    return wanted, path


def resumed_dataset(path: Path, recipe: Recipe, changes: dict[str, Any]) -> Dataset:
    """The very ids that the training began with: from the cache, or made again, from where the user says."""
    corpus = folder.read_manifest(path)["corpus"]
    moved = "data.corpus" in changes
    if not moved and (dataset := find_prepared(corpus["prepared"])) is not None:
        return dataset
    if not moved and not text_is_there(recipe.data.corpus):
        raise UnrolledError(f"the text of {path}, {recipe.data.corpus!r}, is no longer here; pass it with --data")
    dataset = make_dataset(recipe, lambda event: None)
    if dataset.key != corpus["prepared"]:
        raise UnrolledError(f"{dataset.name} is not the text that {path} was begun with")
    return dataset


def memory_needed(recipe: Recipe, vocab_size: int) -> int:
    """Bytes that a training takes at least.

    Weights, gradients, the optimiser's tensors; of a window what every layer keeps for its gradient (its outputs,
    gates and cells), and the exponentials of all logits where the kernels keep them in bf16.
    """
    model, training = recipe.model, recipe.training
    copies = 4 if training.optimizer == "adamw" else 2
    kept = {"lstm": 6, "gru": 5, "elman": 2, "jordan": 2}[model.cell] * sum(model.hidden_sizes)
    tokens = training.num_steps * training.batch_size
    are_kept = training.precision == "bf16" and build.library() is not None and vocab_size > FEW_WORDS
    exponentials = 2 * vocab_size if are_kept else 0
    return 4 * copies * num_parameters(model, vocab_size) + tokens * (exponentials + 4 * kept)


def note(text: str) -> dict[str, Any]:
    return {"event": "note", "text": text}
