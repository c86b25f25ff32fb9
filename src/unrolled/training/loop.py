"""Stateful truncated back-propagation through time, plain code; the update is in `run_epoch`."""

import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import torch

from unrolled import folder
from unrolled.data.batches import Windows
from unrolled.data.dataset import Dataset, find_prepared, prepare
from unrolled.data.text import KNOWN, open_corpus, text_is_there
from unrolled.data.tokens import Vocabulary
from unrolled.errors import UnrolledError
from unrolled.inference.evaluate import Evaluation, evaluate_exact, evaluate_paper, ngram_perplexity
from unrolled.inference.generate import sample
from unrolled.kernels import build
from unrolled.nn.loss import perplexity
from unrolled.nn.model import LanguageModel
from unrolled.nn.unroll import LayerStates, detach
from unrolled.recipe import Recipe, Training, load_recipe
from unrolled.run import Run, build_model, load, num_parameters, pick_device, refuse_what_cannot_fit
from unrolled.training.optim import clip_and_step, learning_rate, make_optimizer
from unrolled.training.resume import Position, load_point, resume_file, save_point

Progress = Callable[[dict[str, Any]], object]
"""Told of everything worth knowing as it happens: {"event": "note" | "step" | "epoch", …}."""

MAY_CHANGE = (
    "training.max_epochs",
    "training.save_every_s",
    "training.sample_every",
    "training.device",
    "data.corpus",
)
"""What a resumed training may have otherwise than before; that the text is the same is seen from its hash."""


_MOST_NGRAMS = 1 << 24


def run_epoch(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    windows: Windows,
    states: LayerStates,
    training: Training,
    position: Position,
    after_step: Callable[[LayerStates, dict[str, float]], bool],
) -> LayerStates:
    """One pass over the training text from `position` on, which it moves along.

    `after_step(states, figures)` is called after each update; the pass is broken off where it returns False.
    """
    model.train()
    device, bf16 = model.device, training.precision == "bf16"
    for inputs, targets in windows.since(position.window):  # ids, each (T, B)
        rate = learning_rate(training, position.epoch, position.step, len(windows) * training.max_epochs)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            nll, count, states = model.nll(inputs.to(device), targets.to(device), detach(states))  # summed nats, tokens
        (nll / training.batch_size).backward()  # the references' scale: summed over time, averaged over streams
        grad_norm = clip_and_step(optimizer, training.max_grad_norm)
        if not math.isfinite(grad_norm):
            raise UnrolledError(
                f"the gradient is not finite at step {position.step + 1}; lower --training.learning-rate "
                f"(now {rate:g}) or --training.max-grad-norm"
            )

        nll_nats = nll.item()
        position.window += 1
        position.step += 1
        position.nll_nats += nll_nats
        position.tokens += count
        figures = {"nll_nats_per_token": nll_nats / count, "learning_rate": rate, "grad_norm": grad_norm}
        if not after_step(states, figures):
            break
    return detach(states)


def train(
    recipe: Recipe | str | Path | None = None,
    *,
    data: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    changes: dict[str, Any] | None = None,
    progress: Progress = lambda event: None,
) -> Run:
    """Trains a recipe to its end, or until SIGINT or SIGTERM, after which `resume` goes on from the very step.

    Args:
        recipe: a recipe, its shipped name, or its TOML file; None is `demo`, or when resuming what `out` holds.
        data: a corpus by name or path, in place of the recipe's.
        out: the run folder; None is `runs/RECIPE-N`, when resuming the newest of them.
        resume: go on from the folder's resume point.
        changes: other values by dotted name, {"training.max_epochs": 3}.
        progress: told of notes, steps and epochs as they happen.

    Returns:
        The run, with its best weights; `run.manifest["status"]` is "done", or "stopped" where it was broken off.

    Raises:
        UnrolledError: bad input; what was trained so far is kept.
    """
    changes = dict(changes or {}) | ({"data.corpus": _located(data)} if data is not None else {})
    if resume:
        recipe, path = _resumed(recipe, out, changes)
    else:
        recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe or "demo")
        recipe = recipe.changed(changes)
        path = Path(out) if out is not None else folder.next_folder(recipe.name)
        folder.refuse_taken(path)
    for name in (recipe.data.corpus, str(path)):
        _refuse_undecodable(name)
    changes = {name: recipe.value(name) for name in changes}
    device = pick_device(recipe.training.device)
    recipe = recipe.changed({"training.precision": _precision(recipe.training.precision, device)})
    training = recipe.training
    dataset = _resumed_dataset(path, recipe, changes) if resume else _dataset(recipe, progress)
    windows = Windows(dataset.ids["train"], training.batch_size, training.num_steps)

    refuse_what_cannot_fit(memory_needed(recipe, len(dataset.tokenizer)))
    torch.manual_seed(training.seed)
    model = build_model(recipe.model, len(dataset.tokenizer)).to(device)
    optimizer = make_optimizer(model, training)
    position, states = Position(), model.initial_state(training.batch_size)
    if resume:
        position, states = load_point(path, model, optimizer)
        folder.reopen(path, recipe, changes)
        folder.cut_metrics(path, position.step, position.epoch)
        if position.epoch > training.max_epochs:
            progress(_note(f"{path} is done; to train on, pass --max-epochs above {training.max_epochs}"))
        else:
            progress(_note(f"going on with {path} at epoch {position.epoch}, step {position.step}"))
    else:
        folder.create(path, recipe, changes, dataset)
        save_point(path, position, model, optimizer, states)  # so that there is a resume point from the first moment
    progress(_note(f"{path}: {model.num_parameters():,} parameters, {windows.num_targets:,} tokens an epoch, {device}"))
    _say_kernels(path, device, training.precision, progress)

    with StopRequest() as stop:
        _train_epochs(path, recipe, dataset, model, optimizer, windows, position, states, stop, progress)
    manifest = folder.read_manifest(path)
    manifest |= {
        "status": "stopped" if position.epoch <= training.max_epochs else "done",
        "epochs": position.epoch - 1,
        "steps": position.step,
        "num_parameters": model.num_parameters(),
        "training_s": round(position.elapsed_s, 1),
        "hardware": folder.hardware(device),
    }
    if manifest["status"] == "done":
        manifest["results"] = _results(load(path, str(device)), dataset)
    folder.write_manifest(path, manifest)
    return load(path, str(device))


def _train_epochs(
    path: Path,
    recipe: Recipe,
    dataset: Dataset,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    windows: Windows,
    position: Position,
    states: LayerStates,
    stop: "StopRequest",
    progress: Progress,
) -> None:
    """Epoch after epoch: train, validate, keep the best weights, save the resume point."""
    training = recipe.training
    steps_in_all = len(windows) * training.max_epochs
    log_every = max(1, len(windows) // 20)
    clock = _Clock(position)
    saved_at = time.monotonic()

    def validated() -> dict[str, Any]:
        valid = validate(model, dataset.ids["valid"], training)
        best = position.best_valid_perplexity is None or valid.perplexity < position.best_valid_perplexity
        if best:
            position.best_valid_perplexity = valid.perplexity
            folder.write_tensors(path / "model.safetensors", model.state_dict(), {"epoch": str(position.epoch)})
        figures = {"valid_perplexity": valid.perplexity, "valid_protocol": valid.protocol, "best": best}
        if model.feeds_back_output:
            own = validate(model, dataset.ids["valid"], training, teacher_forced=False)
            figures["valid_own_output_perplexity"] = own.perplexity
        return figures

    def sampled() -> dict[str, str]:
        if not training.sample_length:
            return {}
        model.eval()
        return {"sample": sample(model, dataset.tokenizer, training.sample_length, training.seed + position.step)}

    def is_due(every: int) -> bool:
        return every > 0 and position.step % every == 0 and position.window < len(windows)

    def after_step(states: LayerStates, figures: dict[str, float]) -> bool:
        nonlocal saved_at
        tokens_per_second = clock.tokens_per_second()
        record: dict[str, Any] = {
            "step": position.step,
            "epoch": position.epoch,
            "train_perplexity": perplexity(position.nll_nats, position.tokens),
            **figures,
            "tokens_per_second": tokens_per_second,
        }
        if is_due(training.valid_every):
            record |= validated()
        if is_due(training.sample_every):
            record |= sampled()
        if not model.training:
            clock.leave_out(tokens_per_second)
            model.train()
        record["elapsed_s"] = clock.read()
        if position.step == 1 or position.window % log_every == 0 or {"sample", "valid_perplexity"} & record.keys():
            folder.append_metrics(path, record)
        place = {"window": position.window, "windows": len(windows), "tokens_an_epoch": windows.num_targets}
        progress({"event": "step", **place, **record})
        if stop.requested or time.monotonic() - saved_at > training.save_every_s:
            save_point(path, position, model, optimizer, detach(states))
            saved_at = time.monotonic()
        return not stop.requested

    while position.epoch <= training.max_epochs:
        clock.start_epoch()
        if position.window < len(windows):
            states = run_epoch(model, optimizer, windows, states, training, position, after_step)
        if stop.requested:
            break
        tokens_per_second = clock.tokens_per_second()
        record = {
            "step": position.step,
            "epoch": position.epoch,
            "train_perplexity": perplexity(position.nll_nats, position.tokens),
            **validated(),
            "learning_rate": learning_rate(training, position.epoch, position.step - 1, steps_in_all),
            "tokens_per_second": tokens_per_second,
            **sampled(),
            "elapsed_s": clock.read(),
        }
        folder.append_metrics(path, record)
        position.epoch, position.window, position.nll_nats, position.tokens = position.epoch + 1, 0, 0.0, 0
        states = model.initial_state(training.batch_size)
        save_point(path, position, model, optimizer, states)
        progress({"event": "epoch", "show_sample": training.sample_every > 0, **record})
    if not (path / "model.safetensors").exists():  # broken off in its first epoch
        folder.write_tensors(path / "model.safetensors", model.state_dict(), {"epoch": "0"})


def validate(model: LanguageModel, ids: np.ndarray, training: Training, teacher_forced: bool = True) -> Evaluation:
    """By the paper protocol, or where the text is too short for its windows, exactly; teacher-forced as in training."""
    if len(ids) // training.batch_size > training.num_steps:
        return evaluate_paper(model, Windows(ids, training.batch_size, training.num_steps), teacher_forced)
    return evaluate_exact(model, ids, teacher_forced=teacher_forced)


def _results(run: Run, dataset: Dataset) -> dict[str, Any]:
    """What the best weights make of valid and test, and what needs no model at all."""
    metrics = [record for record in folder.read_metrics(run.path) if "valid_perplexity" in record]
    if not metrics:
        raise UnrolledError(f"{run.path / 'metrics.jsonl'} has lost its epochs; the weights are whole")
    best = min(metrics, key=lambda record: record["valid_perplexity"] or math.inf)
    vocab_size = len(dataset.tokenizer)
    ngrams = {"unigram": 1, "bigram": 2, "trigram": 3}
    return {
        "best_epoch": best["epoch"],
        "best_step": best["step"],
        "train_perplexity": best["train_perplexity"],
        "valid_perplexity": best["valid_perplexity"],
        "valid_protocol": best["valid_protocol"],
        "valid": run.evaluate("valid"),
        "test": run.evaluate("test"),
        "uniform_test_perplexity": vocab_size,
        **{
            f"{name}_test_perplexity": ngram_perplexity(dataset.ids["train"], dataset.ids["test"], vocab_size, n)
            for name, n in ngrams.items()
            if n == 1 or vocab_size**n <= _MOST_NGRAMS
        },
    }


# ------------------------------------------------------------------------------------------------ before the loop


def _dataset(recipe: Recipe, progress: Progress) -> Dataset:
    data = recipe.data
    corpus = open_corpus(data.corpus, None if data.tokens == "byte" else data.encoding)
    dataset = prepare(corpus, Vocabulary(data.tokens, data.vocab_size, data.min_count, data.unknown))
    note = f"{dataset.name}: " + ", ".join(f"{split} {info.tokens:,}" for split, info in dataset.splits.items())
    progress(
        _note(f"{note} tokens; vocabulary {len(dataset.tokenizer):,}" + (f"; {dataset.note}" * bool(dataset.note)))
    )
    valid = dataset.splits["valid"]
    if valid.unknown > 0.05 * valid.tokens:
        share = valid.unknown / valid.tokens
        way_out = "try --data.tokens bpe, or another --data.vocab-size or --data.min-count"
        progress(_note(f"{share:.1%} of valid is <unk>: {way_out}"))
    if valid.tokens < 2 or dataset.splits["test"].tokens < 2:
        raise UnrolledError(f"{dataset.name} is too short: valid and test take two tokens or more each")
    return dataset


def _precision(asked: str, device: torch.device) -> str:
    """What `auto` comes to here."""
    if asked != "auto":
        return asked
    return "bf16" if device.type == "cpu" and build.multiplies_bf16() else "f32"


def _say_kernels(path: Path, device: torch.device, precision: str, progress: Progress) -> None:
    """Which kernels run, what would make it faster, and whether a resumed training began with others."""
    if device.type != "cpu":
        return
    used, before = build.in_use(), folder.read_manifest(path)["versions"].get("kernels")
    if build.chosen_level() is None:
        progress(_note(f"{precision}, on PyTorch alone: UNROLLED_KERNELS is off"))
    elif used == "none":
        progress(_note(f"{precision}, on PyTorch alone; unrolled kernels build makes this several times faster"))
    else:
        progress(_note(f"{precision}, on the {used} kernels"))
    if before not in (None, used):
        progress(_note(f"this run began on the {before} kernels; it goes on, but not bit for bit"))


def _located(data: str) -> str:
    """A path that holds from any folder; a name as it is."""
    _refuse_undecodable(data)
    return str(Path(data).resolve()) if data != "-" and data not in KNOWN and Path(data).exists() else data


def _refuse_undecodable(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UnrolledError(f"the name {name!r} is not UTF-8; rename the file") from error


def _resumed(
    recipe: Recipe | str | Path | None, out: str | Path | None, changes: dict[str, Any]
) -> tuple[Recipe, Path]:
    """The recipe and folder to go on with; refused where the recipe asks for something else than was begun."""
    asked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe) if recipe is not None else None
    path = Path(out) if out is not None else folder.latest_folder(asked.name if asked else "demo")
    if path is None or not resume_file(path).is_file():
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


def _resumed_dataset(path: Path, recipe: Recipe, changes: dict[str, Any]) -> Dataset:
    """The very ids that the training began with: from the cache, or made again, from where the user says."""
    corpus = folder.read_manifest(path)["corpus"]
    moved = "data.corpus" in changes
    if not moved and (dataset := find_prepared(corpus["prepared"])) is not None:
        return dataset
    if not moved and not text_is_there(recipe.data.corpus):
        raise UnrolledError(f"the text of {path}, {recipe.data.corpus!r}, is no longer here; pass it with --data")
    dataset = _dataset(recipe, lambda event: None)
    if dataset.key != corpus["prepared"]:
        raise UnrolledError(f"{dataset.name} is not the text that {path} was begun with")
    return dataset


def memory_needed(recipe: Recipe, vocab_size: int) -> int:
    """Bytes that a training takes at least: weights, gradients, the optimiser's tensors, a window's logits twice."""
    training = recipe.training
    copies = 4 if training.optimizer == "adamw" else 2
    logits = training.num_steps * training.batch_size * vocab_size
    return 4 * (copies * num_parameters(recipe.model, vocab_size) + 2 * logits)


def _note(text: str) -> dict[str, Any]:
    return {"event": "note", "text": text}


class StopRequest:
    """Within it, SIGINT and SIGTERM ask for a stop after the current step; a second SIGINT stops at once.

    Off the main thread, where Python has no signals, nothing is asked for.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


class _Clock:
    """Seconds of training, over breaks too, and the speed within the running epoch."""

    def __init__(self, position: Position) -> None:
        self.position = position
        self.begun = time.monotonic() - position.elapsed_s
        self.start_epoch()

    def start_epoch(self) -> None:
        self.epoch_begun, self.tokens_before = time.monotonic(), self.position.tokens

    def leave_out(self, tokens_per_second: float) -> None:
        """What was not training since the speed was read is not to lower it."""
        self.epoch_begun = time.monotonic() - (self.position.tokens - self.tokens_before) / tokens_per_second

    def read(self) -> float:
        self.position.elapsed_s = time.monotonic() - self.begun
        return self.position.elapsed_s

    def tokens_per_second(self) -> float:
        return (self.position.tokens - self.tokens_before) / max(time.monotonic() - self.epoch_begun, 1e-9)
