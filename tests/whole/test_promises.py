"""What the software promises, from text to answer."""

import itertools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kills import is_same
from torch import nn
from torch.nn import functional as F

import unrolled
from unrolled.data.dataset import prepare_with
from unrolled.data.embedded import toy_entropy_rate
from unrolled.data.reading import Corpus
from unrolled.data.text import open_corpus
from unrolled.files import cache_folder
from unrolled.folder import read_tensors, write_tensors
from unrolled.metrics import read_metrics
from unrolled.nn.model import LanguageModel
from unrolled.nn.unroll import unroll_plain
from unrolled.training.resume import can_resume


def test_toy_is_learnt_to_within_three_percent_of_the_least_possible_perplexity(tmp_path: Path) -> None:
    run = unrolled.train("demo", data="toy", out=tmp_path / "run", changes={"training.max_epochs": 2})
    least = math.exp(toy_entropy_rate())
    reached = run.evaluate("test")["perplexity"]
    assert 0.98 * least < reached < 1.03 * least


def test_training_is_the_references_on_torchs_own_lstm(tmp_path: Path) -> None:
    """The same first values, text and rate on nn.LSTM, with the loss summed over time and averaged over streams."""
    changes = {
        "data.corpus": "toy",
        "model.embedding_size": 24,
        "model.hidden_sizes": "24,24",
        "training.batch_size": 40,
        "training.max_epochs": 2,
        "training.learning_rate": 0.1,
        "training.constant_epochs": 1,
    }
    run = unrolled.train("ptb-small", out=tmp_path / "run", changes=changes)
    metrics = [record for record in read_metrics(run.path) if "valid_perplexity" in record]

    torch.manual_seed(1)
    first = LanguageModel(len(run.tokenizer), 24, [24, 24])
    lstm = nn.LSTM(24, 24, num_layers=2)
    for number, cell in enumerate(first.layers):
        for name, parameter in cell.named_parameters():
            getattr(lstm, f"{name}_l{number}").data.copy_(parameter)
        getattr(lstm, f"bias_hh_l{number}").requires_grad_(False).zero_()
    parameters = [
        p for module in (first.embedding, lstm, first.decoder) for p in module.parameters() if p.requires_grad
    ]
    text = "".join(_split_text("train"))
    ids = torch.from_numpy(run.tokenizer.encode(text).astype(np.int64))
    length = len(ids) // 40
    data = ids[: 40 * length].view(40, length)
    for epoch in (1, 2):
        state, total, count = None, 0.0, 0
        for k in range((length - 1) // 20):
            inputs, targets = data[:, k * 20 : k * 20 + 20].t(), data[:, k * 20 + 1 : k * 20 + 21].t()
            hidden, state = lstm(first.embedding(inputs), state)
            state = tuple(part.detach() for part in state)
            logits = first.decoder(hidden)
            nll_nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            gradients = torch.autograd.grad(nll_nats / 40, parameters)
            norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
            rate = 0.1 if epoch == 1 else 0.05
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= rate * min(1.0, 5.0 / norm) * gradient
            total, count = total + nll_nats.item(), count + targets.numel()
        assert metrics[epoch - 1]["train_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def _split_text(split: str) -> list[str]:
    from unrolled.data.reading import read_text
    from unrolled.data.text import open_corpus

    corpus: Corpus = open_corpus("toy")
    return list(read_text(corpus, split))


def test_the_plain_loop_trains_to_where_the_fused_layer_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {
        "model.embedding_size": 8,
        "model.hidden_sizes": "12",
        "training.max_epochs": 1,
        "training.batch_size": 200,
    }
    fused = unrolled.train("demo", data="toy", out=tmp_path / "fused", changes=changes)
    monkeypatch.setattr("unrolled.nn.model.unroll", unroll_plain)
    plain = unrolled.train("demo", data="toy", out=tmp_path / "plain", changes=changes)
    assert plain.evaluate()["perplexity"] == pytest.approx(fused.evaluate()["perplexity"], rel=1e-3)


def test_a_teacher_forced_jordan_network_reaches_the_bigrams_of_its_text_and_no_more(tmp_path: Path) -> None:
    changes = {
        "data.corpus": "toy",
        "model.hidden_sizes": "32",
        "training.max_epochs": 3,
        "training.learning_rate": 1.0,
        "training.max_grad_norm": 5.0,
    }
    run = unrolled.train("text8-jordan", out=tmp_path / "run", changes=changes)
    ids = prepare_with(open_corpus("toy"), run.tokenizer).ids["train"]
    counts = np.zeros((len(run.tokenizer),) * 2)
    np.add.at(counts, (ids[:-1], ids[1:]), 1)
    of_row = counts.sum(axis=1, keepdims=True)
    conditional = np.divide(counts, of_row, out=np.ones_like(counts), where=counts > 0)
    bigram = math.exp(-(counts * np.log(conditional)).sum() / counts.sum())
    reached = run.evaluate("train")
    assert bigram * (1 - 1e-6) < reached["teacher_forced"]["perplexity"] < bigram * 1.01
    assert reached["perplexity"] > bigram * 1.01  # by its own output, which it was not trained with, it does worse
    results = run.manifest["results"]
    assert results["test"]["teacher_forced"]["perplexity"] == pytest.approx(results["bigram_test_perplexity"], rel=0.01)


def test_samples_are_shown_when_asked_for_and_change_nothing(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    changes = SMALL | {"training.max_epochs": 1, "model.dropout": 0.2}
    silent = unrolled.train("demo", data="toy", out=tmp_path / "silent", changes=changes)
    asked = changes | {"training.sample_every": 40, "training.valid_every": 60, "training.sample_length": 12}
    unrolled.train("demo", data="toy", out=tmp_path / "asked", changes=asked, progress=events.append)
    steps = [event["step"] for event in events if event["event"] == "step" and "sample" in event]
    assert steps == list(range(40, silent.manifest["steps"], 40))
    assert [e["step"] for e in events if e["event"] == "step" and "valid_perplexity" in e] == list(
        range(60, silent.manifest["steps"], 60)
    )
    name = "last/resume.safetensors"
    mine, theirs = (read_tensors(tmp_path / run / name)[0] for run in ("silent", "asked"))
    assert all(torch.equal(mine[tensor], theirs[tensor]) for tensor in mine)
    (at_the_end,) = [record["sample"] for record in read_metrics(silent.path) if "sample" in record]
    assert 20 <= len(at_the_end.split()) <= 100


def test_a_sample_is_the_same_after_a_break(tmp_path: Path) -> None:
    changes = SMALL | {"training.sample_every": 30, "training.valid_every": 45}
    whole = unrolled.train("demo", data="toy", out=tmp_path / "whole", changes=changes)
    path = tmp_path / "broken"

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 100:
            signal.raise_signal(signal.SIGINT)

    unrolled.train("demo", data="toy", out=path, changes=changes, progress=stop)
    broken = unrolled.train(None, out=path, resume=True)
    times = ("elapsed_s", "tokens_per_second")
    timeless = [
        [{name: value for name, value in record.items() if name not in times} for record in read_metrics(run.path)]
        for run in (whole, broken)
    ]
    assert timeless[0] == timeless[1]


def test_ptb_begins_at_the_loss_of_the_uniform(ptb: str, tmp_path: Path) -> None:
    seen: list[float] = []

    def stop_at_once(event: dict) -> None:
        if event["event"] == "step":
            seen.append(event["nll_nats_per_token"])
            os.kill(os.getpid(), signal.SIGINT)

    run = unrolled.train("ptb-small", out=tmp_path / "run", progress=stop_at_once)
    assert run.manifest["status"] == "stopped"
    assert len(seen) == 1
    assert abs(seen[0] - math.log(10_000)) < 0.01
    assert run.model.num_parameters() == 4_651_600


# ------------------------------------------------------------------------------------------------ broken off, gone on

SMALL = {
    "model.embedding_size": 12,
    "model.hidden_sizes": "16",
    "training.batch_size": 60,
    "training.max_epochs": 2,
    "training.save_every_s": 0.05,
}


@pytest.mark.parametrize(("optimizer", "tied"), [("sgd", False), ("sgd", True), ("adamw", False), ("adamw", True)])
def test_a_stopped_training_goes_on_to_where_the_unbroken_one_ends(tmp_path: Path, optimizer: str, tied: bool) -> None:
    changes = SMALL | {"training.optimizer": optimizer, "model.dropout": 0.2, "model.tie_weights": tied}
    changes |= {"model.embedding_size": 16} if tied else {}
    unrolled.train("demo", data="toy", out=tmp_path / "unbroken", changes=changes)

    def stop_at(step: int):
        return lambda event: (
            event.get("step") == step and event["event"] == "step" and os.kill(os.getpid(), signal.SIGINT)
        )

    path = tmp_path / "broken"
    first = unrolled.train("demo", data="toy", out=path, changes=changes, progress=stop_at(50))
    assert (first.manifest["status"], first.manifest["steps"]) == ("stopped", 50)
    assert first.predict("the").words  # usable in between
    for step in (120, 121, 240):
        unrolled.train("demo", out=path, resume=True, progress=stop_at(step))
    assert unrolled.train(None, out=path, resume=True).manifest["status"] == "done"
    assert is_same(tmp_path / "unbroken", path)


def test_a_killed_training_goes_on_to_where_the_unbroken_one_ends(tmp_path: Path) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    begin = [sys.executable, "-m", "unrolled", "train", "demo", "--data", "toy", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*begin, "--out", tmp_path / "unbroken"], check=True, capture_output=True, env=environment)
    path = tmp_path / "killed"
    command = [*begin, "--out", path]
    for lines in (3, 5, 2):
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            shown = (line for line in process.stderr if "tokens/s" in line)
            for _ in itertools.islice(shown, lines):
                pass
            assert can_resume(path)
            process.kill()
        assert process.returncode in (-signal.SIGKILL, 0)  # it may have come to its end before it was hit
        command = [sys.executable, "-m", "unrolled", "train", "--resume", "--out", path]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert is_same(tmp_path / "unbroken", path)


def test_the_state_is_carried_within_an_epoch_and_zero_at_the_start_of_the_next(tmp_path: Path) -> None:
    path = tmp_path / "run"

    def stop(event: dict) -> None:
        if event["event"] == "step" and event["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    def state() -> list[torch.Tensor]:
        tensors, _ = read_tensors(path / "last/resume.safetensors")
        return [tensor for name, tensor in tensors.items() if name.startswith("state.")]

    unrolled.train("ptb-small", data="toy", out=path, changes=SMALL | {"training.max_epochs": 1}, progress=stop)
    assert all(tensor.any() for tensor in state())
    unrolled.train(None, out=path, resume=True)
    assert len(state()) == 2
    assert not any(tensor.any() for tensor in state())


def test_a_resumed_training_may_go_on_longer(tmp_path: Path) -> None:
    unrolled.train("ptb-small", data="toy", out=tmp_path / "long", changes=SMALL)
    unrolled.train("ptb-small", data="toy", out=tmp_path / "run", changes=SMALL | {"training.max_epochs": 1})
    run = unrolled.train(None, out=tmp_path / "run", resume=True, changes={"training.max_epochs": 2})
    assert run.recipe.training.max_epochs == 2
    assert is_same(tmp_path / "long", tmp_path / "run")


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        unrolled.train("demo", data="toy", out=tmp_path / name, changes=SMALL | {"training.seed": seed})
    assert is_same(tmp_path / "a", tmp_path / "b")
    assert not is_same(tmp_path / "a", tmp_path / "c")


def test_a_rate_that_blows_up_is_said_and_reaches_no_saved_weights(tmp_path: Path) -> None:
    changes = SMALL | {"training.learning_rate": 1e38, "training.optimizer": "sgd", "training.save_every_s": 1e9}
    path = tmp_path / "run"
    with pytest.raises(unrolled.UnrolledError, match=r"no finite loss and gradient.* lower --training"):
        unrolled.train("ptb-small", data="toy", out=path, changes=changes)
    tensors, _ = read_tensors(path / "last/resume.safetensors")
    assert all(tensor.isfinite().all() for name, tensor in tensors.items() if name.startswith("model."))


def test_a_resume_point_whose_optimizer_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    unrolled.train("demo", data="toy", out=path, changes=SMALL | {"training.max_epochs": 1})
    tensors, metadata = read_tensors(path / "last/resume.safetensors")
    spoilt = tensors["optimizer.1.exp_avg"].clone().fill_(torch.nan)
    for name, wrong in (
        ("exp_avg_sq", torch.zeros(4)),
        ("step", torch.tensor(torch.nan)),
        ("step", torch.tensor(-1.0)),
        ("exp_avg", spoilt),
    ):
        write_tensors(path / "last/resume.safetensors", tensors | {f"optimizer.1.{name}": wrong}, metadata)
        with pytest.raises(unrolled.UnrolledError, match="does not fit the recipe of its run"):
            unrolled.train(None, out=path, resume=True, changes={"training.max_epochs": 2})


def test_values_of_any_kind_that_fits_are_kept_as_the_recipe_has_them(tmp_path: Path) -> None:
    changes = SMALL | {"model.hidden_sizes": (np.int64(8),), "training.max_epochs": 1}
    run = unrolled.train("demo", data="toy", out=tmp_path / "run", changes=changes)
    assert run.manifest["changes"]["model.hidden_sizes"] == [8]


def test_what_was_changed_on_resuming_stays_changed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    changes = SMALL | {"training.max_epochs": 1}
    unrolled.train("ptb-small", data="toy", out=path, changes=changes)
    unrolled.train("ptb-small", out=path, resume=True, changes={"training.max_epochs": 3})
    run = unrolled.train("ptb-small", out=path, resume=True)
    assert run.recipe.training.max_epochs == 3
    assert run.manifest["epochs"] == 3


def test_resuming_with_other_text_or_an_edited_recipe_is_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "run", tmp_path / "other.txt"
    first = unrolled.train("demo", data="toy", out=path, changes=SMALL)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    other.write_text("some other text\n" * 5_000)
    with pytest.raises(unrolled.UnrolledError, match="is not the text that"):
        unrolled.train(None, data=str(other), out=path, resume=True, changes={"training.max_epochs": 3})
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    recipe = path / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("dropout = 0.2", "dropout = 0.3"))
    with pytest.raises(unrolled.UnrolledError, match=r"recipe\.toml is damaged or was changed"):
        unrolled.train(None, out=path, resume=True)
    assert first.manifest["status"] == "done"


def test_bf16_learns_what_f32_learns(tmp_path: Path) -> None:
    figures = []
    for precision in ("f32", "bf16"):
        changes = SMALL | {"training.precision": precision, "training.learning_rate": 0.02, "model.init_scale": 0.3}
        figures.append(unrolled.train("demo", data="toy", out=tmp_path / precision, changes=changes).evaluate())
    assert figures[1]["perplexity"] == pytest.approx(figures[0]["perplexity"], rel=0.05)


# ------------------------------------------------------------------------------------------------ a text of one's own


@pytest.mark.parametrize("tokens", ["word", "character", "byte", "bpe"])
def test_a_users_own_text_is_trained_on_with_one_command_and_used_elsewhere_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: str
) -> None:
    """A megabyte of real English in one file; then the file, the cache and the folder it was trained in are gone."""
    from unrolled.data.text import open_corpus

    open_corpus("stdlib")
    (source,) = (cache_folder() / "corpora").glob("stdlib-*/train.txt")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("mine.txt").write_bytes(source.read_bytes()[:1_000_000])
    options = ["--max-epochs", "1", "--model.hidden-sizes", "32", "--model.embedding-size", "32"]
    small = [*options, "--training.batch-size", "100", "--data.tokens", tokens, "--data.vocab-size", "2000"]
    command = [sys.executable, "-m", "unrolled"]
    environment = os.environ | {"UNROLLED_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "train", "--data", "mine.txt", *small], capture_output=True, text=True, check=True, env=environment
    )
    assert "run folder runs/demo-1" in done.stdout

    (tmp_path / "elsewhere").mkdir()
    Path("runs/demo-1").rename(tmp_path / "elsewhere/model")
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "here/mine.txt").unlink()
    monkeypatch.setenv("UNROLLED_CACHE", str(tmp_path / "empty"))
    run = unrolled.load("model")
    assert run.evaluate()["perplexity"] < run.manifest["results"]["unigram_test_perplexity"] * 1.05
    assert len(run.predict("the value of", k=5).words) == 5
    assert run.generate("the", length=50, seed=1)
    assert run.score("return the value").log_prob < 0
