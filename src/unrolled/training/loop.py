"""Stateful truncated back-propagation through time, plain code; the update is in `run_epoch`."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unrolled import folder
from unrolled.data.batches import Windows
from unrolled.data.dataset import Dataset
from unrolled.errors import UnrolledError
from unrolled.inference.evaluate import Evaluation, evaluate_exact, evaluate_paper, ngram_perplexity
from unrolled.inference.generate import sample
from unrolled.metrics import append_metrics, read_metrics
from unrolled.nn.model import LanguageModel
from unrolled.nn.unroll import LayerStates, detach
from unrolled.recipe import Recipe, Training, load_recipe
from unrolled.run import Run, build_model, load, refuse_what_cannot_fit
from unrolled.training import start
from unrolled.training.distributed import ALONE, Ranks, joined_ranks
from unrolled.training.optim import clip_and_step, learning_rate, make_optimizer
from unrolled.training.resume import Keeper, Position, seed
from unrolled.training.start import Progress, note
from unrolled.training.stop import StopRequest

_MOST_NGRAMS = 1 << 24
_SEEDS_APART = 1_000_003


def run_epoch(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    windows: Windows,
    states: LayerStates,
    training: Training,
    position: Position,
    after_step: Callable[[LayerStates, dict[str, float]], bool],
    ranks: Ranks = ALONE,
) -> LayerStates:
    """One pass over the training text from `position` on, which it moves along. Of several processes each has windows
    of its own streams, and all take the same steps.

    A step whose loss or gradient is not finite is not taken: weights and state stay as they were, and it is counted.
    `after_step(states, figures)` is called after each step; the pass is broken off where it returns False.
    """
    model.train()
    device, bf16 = model.device, training.precision == "bf16"
    for inputs, targets in windows.since(position.window):  # ids, each (T, B)
        rate = learning_rate(training, position.epoch, position.step, len(windows) * training.max_epochs)
        rate *= position.rate_factor
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            nll, count, after = model.nll(inputs.to(device), targets.to(device), detach(states))  # summed nats, tokens
        (nll_nats, tokens), grad_norm = ranks.sum(nll.item(), count), math.nan
        if math.isfinite(nll_nats):
            (nll / training.batch_size).backward()  # the references' scale: summed over time, averaged over streams
            ranks.sum_gradients(model.parameters())
            grad_norm = clip_and_step(optimizer, training.max_grad_norm, training.norm_convention)

        position.window += 1
        position.step += 1
        if math.isfinite(grad_norm):
            states, position.skipped_in_a_row = after, 0
            position.nll_nats += nll_nats
            position.tokens += int(tokens)
        else:
            position.skipped_in_a_row += 1
            position.skipped += 1
        figures = {"nll_nats_per_token": nll_nats / tokens, "learning_rate": rate, "grad_norm": grad_norm}
        if not after_step(states, figures):
            break
    return detach(states)


def train(
    recipe: Recipe | str | Path | None = None,
    *,
    data: str | Path | None = None,
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
        The run, with its best weights; `run.manifest["status"]` is "done", or "stopped" where it was broken off: the
        signal that asked for it is not passed on. PyTorch's random generators stand where they stood.

    Of several processes, as `torchrun` starts them, each trains on its share of the streams; the first alone writes,
    and tells `progress`.

    Raises:
        UnrolledError: bad input, or losses that stay without bound; what was trained so far is kept.
    """
    changes = dict(changes or {}) | ({"data.corpus": start.located(str(data))} if data is not None else {})
    if resume:
        recipe, path = start.resumed(recipe, out, changes)
    else:
        recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe or "demo")
        recipe = recipe.changed(changes)
        path = Path(out) if out is not None else folder.next_folder(recipe.name)
        folder.refuse_taken(path)
    for name in (recipe.data.corpus, str(path)):
        start.refuse_undecodable(name)
    changes = {name: recipe.value(name) for name in changes}
    with joined_ranks(recipe.training.device) as (ranks, device):
        start.refuse_shares(recipe, ranks)
        progress = progress if ranks.is_first else lambda event: None
        recipe = recipe.changed({"training.precision": start.settle_precision(recipe.training.precision, device)})
        with ranks.first_ahead():
            dataset = start.resumed_dataset(path, recipe, changes) if resume else start.make_dataset(recipe, progress)
        windows = Windows(dataset.ids["train"], recipe.training.batch_size, recipe.training.num_steps)
        refuse_what_cannot_fit(start.memory_needed(recipe, len(dataset.tokenizer)))
        if ranks.is_first and out is None and not resume:
            path = folder.reserve(recipe.name)
        path = Path(ranks.told(str(path)))
        with folder.locked(path) if ranks.is_first else nullcontext():
            if ranks.is_first:
                folder.sweep(path)
                if not resume:
                    id, kernels = start.identity(recipe, dataset), start.kernels_on(device)
                    folder.create(path, recipe, changes, dataset, id, kernels)
            ranks.wait()
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                return _train(path, recipe, changes, dataset, windows, device, resume, progress, ranks)


def _train(
    path: Path,
    recipe: Recipe,
    changes: dict[str, Any],
    dataset: Dataset,
    windows: Windows,
    device: torch.device,
    resume: bool,
    progress: Progress,
    ranks: Ranks,
) -> Run:
    """The training of a run folder that is there, locked, from its beginning or its resume point."""
    training = recipe.training
    seed(training.seed, device)
    model = build_model(recipe.model, len(dataset.tokenizer)).to(device)
    if not ranks.is_first:
        seed(training.seed + ranks.rank * _SEEDS_APART, device)  # dropout of its own
    id = ranks.told((folder.read_manifest(path).get("id") or "") if ranks.is_first else "") or None
    keeper = Keeper(path, id, training, model, make_optimizer(model, training), ranks)
    position = keeper.position
    if resume:
        keeper.go_back()
        if ranks.is_first:
            folder.reopen(path, recipe, changes, start.kernels_on(device))
        if position.epoch > training.max_epochs:
            progress(note(f"{path} is done; to train on, pass --max-epochs above {training.max_epochs}"))
        else:
            progress(note(f"going on with {path} at epoch {position.epoch}, step {position.step}"))
    else:
        keeper.save(keeper.states)  # so that there is a resume point from the first moment
    progress(note(f"{path}: {model.num_parameters():,} parameters, {windows.num_targets:,} tokens an epoch, {device}"))
    if ranks.is_first:
        start.say_kernels(path, device, recipe, progress)

    reason = None
    with StopRequest() as stop:
        try:
            _train_epochs(path, training, dataset, windows, keeper, stop, progress, ranks)
        except UnrolledError as error:
            reason = str(error)
            raise
        finally:
            if ranks.is_first:
                manifest = folder.read_manifest(path) | {
                    "status": "stopped" if position.epoch <= training.max_epochs else "done",
                    "reason": reason,
                    "epochs": position.epoch - 1,
                    "steps": position.step,
                    "skipped_steps": position.skipped,
                    "num_parameters": model.num_parameters(),
                    "training_s": round(position.elapsed_s, 1),
                    "hardware": folder.hardware(device) | ({"processes": ranks.world} if ranks.world > 1 else {}),
                }
                folder.write_manifest(path, manifest)
    if ranks.is_first and position.epoch > training.max_epochs:
        results = {"results": _results(load(path, str(device)), dataset)}
        folder.write_manifest(path, folder.read_manifest(path) | results)
    ranks.wait()
    return load(path, str(device))


def _train_epochs(
    path: Path,
    training: Training,
    dataset: Dataset,
    windows: Windows,
    keeper: Keeper,
    stop: StopRequest,
    progress: Progress,
    ranks: Ranks,
) -> None:
    """Epoch after epoch: train, validate, keep the best weights, save the resume point."""
    model, position = keeper.model, keeper.position
    log_every, steps_in_all = max(1, len(windows) // 20), len(windows) * training.max_epochs
    clock, stops = _Clock(position), False

    def validated() -> dict[str, Any]:
        valid = validate(model, dataset.ids["valid"], training)
        figures = {"valid_perplexity": valid.perplexity, "valid_protocol": valid.protocol}
        figures["best"] = keeper.keep_if_best(valid.perplexity)
        if model.feeds_back_output:
            own = validate(model, dataset.ids["valid"], training, teacher_forced=False)
            figures["valid_own_output_perplexity"] = own.perplexity
        return figures

    def sampled() -> dict[str, str]:
        if not training.sample_length or not keeper.is_sound():
            return {}
        model.eval()
        return {
            "sample": sample(
                model, dataset.tokenizer, training.sample_length, (training.seed + position.step) % (1 << 63)
            )
        }

    def is_due(every: int) -> bool:
        return every > 0 and position.step % every == 0 and position.window < len(windows)

    def report(figures: dict[str, float]) -> None:
        tokens_per_second = clock.tokens_per_second()
        record: dict[str, Any] = {
            "step": position.step,
            "epoch": position.epoch,
            "train_perplexity": position.train_perplexity,
            **figures,
            "tokens_per_second": tokens_per_second,
        }
        logged = position.step == 1 or position.window % log_every == 0
        if position.skipped_in_a_row:
            logged, record["skipped"] = True, position.skipped
            if position.skipped_in_a_row == 1:
                progress(note(f"step {position.step:,} is not taken: its loss or gradient is not finite"))
        if is_due(training.valid_every):
            record |= validated()
        if is_due(training.sample_every):
            record |= sampled()
        if not model.training:
            logged = True
            clock.leave_out(tokens_per_second)
            model.train()
        record["elapsed_s"] = clock.read()
        if logged:
            append_metrics(path, record)
        place = {"window": position.window, "windows": len(windows), "tokens_an_epoch": windows.num_targets}
        progress({"event": "step", **place, **record})

    def after_step(states: LayerStates, figures: dict[str, float]) -> bool:
        nonlocal stops
        if ranks.is_first:
            report(figures)
        # asked here alone: nothing ends the training that has not saved it
        stops, saves = ranks.any(stop.requested, ranks.is_first and keeper.is_due())
        if stops or saves:
            keeper.save(detach(states))
        return not stops and not keeper.gives_up()

    def epoch_record() -> dict[str, Any]:
        tokens_per_second = clock.tokens_per_second()
        rate = learning_rate(training, position.epoch, position.step - 1, steps_in_all)
        record = {
            "step": position.step,
            "epoch": position.epoch,
            "train_perplexity": position.train_perplexity,
            **validated(),
            "learning_rate": rate * position.rate_factor,
            "tokens_per_second": tokens_per_second,
            **sampled(),
            "elapsed_s": clock.read(),
        }
        append_metrics(path, record)
        return record

    while position.epoch <= training.max_epochs:
        clock.start_epoch()
        if position.window < len(windows):
            ranks.copy_first(model.parameters())
            share = windows.part(ranks.streams(training.batch_size))
            states, optimizer = keeper.states, keeper.optimizer
            keeper.states = run_epoch(model, optimizer, share, states, training, position, after_step, ranks)
        if keeper.gives_up():
            progress(note(keeper.roll_back()))
            clock = _Clock(position)
            continue
        if stops:
            break
        if ranks.world > 1:  # torchrun waits 30 s after a signal, and the validation may take longer
            keeper.save(keeper.states)
        record = epoch_record() if ranks.is_first else {}
        position.epoch, position.window, position.nll_nats, position.tokens = position.epoch + 1, 0, 0.0, 0
        keeper.save(keeper.zero_states())
        progress({"event": "epoch", "show_sample": training.sample_every > 0, **record})
    if ranks.is_first:
        keeper.keep_some()


def validate(model: LanguageModel, ids: np.ndarray, training: Training, teacher_forced: bool = True) -> Evaluation:
    """By the paper protocol, or where the text is too short for its windows, exactly; teacher-forced as in training."""
    if len(ids) // training.batch_size > training.num_steps:
        return evaluate_paper(model, Windows(ids, training.batch_size, training.num_steps), teacher_forced)
    return evaluate_exact(model, ids, teacher_forced=teacher_forced)


def _results(run: Run, dataset: Dataset) -> dict[str, Any]:
    """What the best weights make of valid and test, and what needs no model at all."""
    metrics = [record for record in read_metrics(run.path) if "valid_perplexity" in record]
    if not metrics:
        raise UnrolledError(f"{run.path / 'metrics.jsonl'} has lost its epochs; the weights are whole")
    _, metadata = folder.read_tensors(run.path / "model.safetensors", run.manifest.get("id"))
    its_own = [record for record in metrics if str(record["epoch"]) == metadata.get("epoch")]
    best = min(its_own or metrics, key=lambda record: record["valid_perplexity"] or math.inf)
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
        self.epoch_begun = time.monotonic() - (self.position.tokens - self.tokens_before) / max(tokens_per_second, 1e-9)

    def read(self) -> float:
        self.position.elapsed_s = time.monotonic() - self.begun
        return self.position.elapsed_s

    def tokens_per_second(self) -> float:
        return (self.position.tokens - self.tokens_before) / max(time.monotonic() - self.epoch_begun, 1e-9)
