"""What docs/reliability.md promises: nothing lost, nothing wrong. Each test says which promise it holds."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz import TARGETS, prepare_folder, run_cases
from hypothesis import given
from hypothesis.strategies import (
    binary,
    booleans,
    dictionaries,
    floats,
    integers,
    lists,
    none,
    one_of,
    recursive,
    sampled_from,
    text,
)
from kills import ENVIRONMENT, kill_loop

import unrolled
from unrolled import Run, UnrolledError, folder
from unrolled.data.batches import Windows
from unrolled.data.dataset import prepare
from unrolled.data.text import open_corpus
from unrolled.data.tokens import Vocabulary
from unrolled.files import write_whole
from unrolled.folder import read_tensors
from unrolled.items import json_item, nbest_item, plain_item
from unrolled.metrics import append_metrics, damaged_metrics, read_metrics
from unrolled.nn.model import LanguageModel
from unrolled.recipe import FIELDS, Recipe, load_recipe
from unrolled.repair import repair
from unrolled.run import refuse_what_cannot_fit
from unrolled.training.loop import run_epoch
from unrolled.training.optim import make_optimizer
from unrolled.training.resume import MOST_ROLLBACKS, MOST_SKIPPED, Position
from unrolled.training.start import memory_needed

SMALL = {"model.embedding_size": 12, "model.hidden_sizes": "16", "training.batch_size": 60, "training.max_epochs": 2}


@pytest.fixture
def copy(toy_run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_run.path, tmp_path / "run"))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path / "model.safetensors")[0]


# ------------------------------------------------------------------------------------------------ exact resume


def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    """SIGKILL anywhere, inside saves too: saving after every step, that is where most of the time goes."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    counts = kill_loop(tmp_path, ["demo", "--data", "toy", *options, "--training.save-every=1"], kills=20, seed=1)
    assert counts["kills"] >= 20
    assert counts["ended"] >= 1
    assert counts["lost"] == 0


def test_between_the_two_renames_of_a_save_the_point_before_is_there(tmp_path: Path) -> None:
    unrolled.train("demo", data="toy", out=tmp_path / "run", changes=SMALL)
    (tmp_path / "run/last/resume.safetensors").unlink()
    unrolled.train(None, out=tmp_path / "run", resume=True)
    unrolled.train("demo", data="toy", out=tmp_path / "other", changes=SMALL)
    for name, tensor in weights(tmp_path / "other").items():
        assert torch.equal(tensor, weights(tmp_path / "run")[name])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_within_a_step(tmp_path: Path, number: signal.Signals) -> None:
    steps: list[int] = []

    def progress(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            steps.append(event["step"])
            if event["step"] == 30:
                os.kill(os.getpid(), number)

    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    run = unrolled.train("demo", data="toy", out=tmp_path / "run", changes=SMALL, progress=progress)
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    assert steps[-1] == 30
    assert (run.manifest["status"], run.manifest["steps"]) == ("stopped", 30)


def test_within_an_epoch_a_resume_point_is_written_as_often_as_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a save takes here: a slow disk alone would have this short epoch pass without one."""
    monkeypatch.setattr("unrolled.training.resume.SAVING_SHARE", math.inf)
    saved: list[int] = []

    def progress(event: dict[str, Any]) -> None:
        if event["event"] == "step" and not saved:
            metadata = read_tensors(tmp_path / "run/last/resume.safetensors")[1]
            if step := json.loads(metadata["position"])["step"]:
                saved.append(step)
                os.kill(os.getpid(), signal.SIGINT)

    changes = SMALL | {"training.save_every": 5}
    run = unrolled.train("demo", data="toy", out=tmp_path / "run", changes=changes, progress=progress)
    assert run.manifest["epochs"] == 0
    assert saved[0] % 5 == 0


def test_a_training_stopped_twice_in_its_first_epoch_has_the_weights_of_the_second_stop(tmp_path: Path) -> None:
    for stop in (10, 20):

        def progress(event: dict[str, Any], stop: int = stop) -> None:
            if event.get("step") == stop:
                os.kill(os.getpid(), signal.SIGINT)

        resume = stop > 10
        run = unrolled.train(
            None if resume else "demo",
            data=None if resume else "toy",
            out=tmp_path / "run",
            resume=resume,
            changes={} if resume else SMALL,
            progress=progress,
        )
        assert run.manifest["steps"] == stop
        point = read_tensors(tmp_path / "run/last/resume.safetensors")[0]
        for name, tensor in weights(run.path).items():
            assert torch.equal(tensor, point[f"model.{name}"])


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    def progress(event: dict[str, Any]) -> None:
        if event.get("step") == 30:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        unrolled.train("demo", data="toy", out=tmp_path / "run", changes=SMALL, progress=progress)
    assert unrolled.train(None, out=tmp_path / "run", resume=True).manifest["status"] == "done"


# ------------------------------------------------------------------------------------------------ whole or not at all


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    path, told = tmp_path / "run", []

    def progress(event: dict[str, Any]) -> None:
        if event.get("step") == 5:
            with pytest.raises(UnrolledError) as caught:
                unrolled.train(None, out=path, resume=True)
            told.append(str(caught.value))
            with pytest.raises(UnrolledError) as caught:
                unrolled.train("demo", data="toy", out=path, changes=SMALL)
            told.append(str(caught.value))
            with pytest.raises(UnrolledError, match="another process is training into"):
                repair(path)

    unrolled.train("demo", data="toy", out=path, changes=SMALL, progress=progress)
    assert "another process is training into" in told[0]
    assert "exists already" in told[1]


def test_a_full_disk_is_one_line_and_the_last_good_state_stays(tmp_path: Path) -> None:
    """A limit on the size of files cuts a write as a full disk does: with an error in the middle of the file."""
    path = tmp_path / "run"
    unrolled.train("demo", data="toy", out=path, changes=SMALL | {"training.max_epochs": 1})
    before = {file: file.read_bytes() for file in (path / "last").glob("*.safetensors")}
    command = [sys.executable, "-m", "unrolled", "train", "--resume", "--out", path, "--max-epochs", "3"]
    limit = f"ulimit -f {(path / 'last/resume.safetensors').stat().st_size // 2 // 512}"
    done = subprocess.run(
        ["sh", "-c", f'{limit}; exec "$@"', "sh", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("unrolled: File too large: ")
    assert "Traceback" not in done.stderr
    assert before == {file: file.read_bytes() for file in (path / "last").glob("*.safetensors")}
    assert not list(path.rglob("*.tmp"))
    assert unrolled.train(None, out=path, resume=True).manifest["status"] == "done"


def test_text_that_changes_while_it_is_read_is_refused_and_not_remembered(write: Callable[..., Path]) -> None:
    text = "a b c\n" * 3000
    path = write("c.txt", text)
    corpus = open_corpus(str(path))
    path.write_text(text[: len(text) * 39 // 40])
    with pytest.raises(UnrolledError, match=r"c\.txt changed while it was read"):
        prepare(corpus, Vocabulary("word"))
    path.write_text(text)
    splits = prepare(open_corpus(str(path)), Vocabulary("word")).splits
    assert sum(info.tokens for info in splits.values()) == 4 * 3000


def test_files_of_a_run_of_another_length_are_refused(tmp_path: Path) -> None:
    short, long = (
        unrolled.train("demo", data="toy", out=tmp_path / str(n), changes=SMALL | {"training.max_epochs": n}).path
        for n in (1, 2)
    )
    shutil.copy(short / "model.safetensors", long)
    assert [finding.state for finding in repair(long) if finding.file == "model.safetensors"] == ["repaired"]


def test_where_the_last_epoch_was_the_best_a_repair_loses_nothing(copy: Path) -> None:
    run = unrolled.load(copy)
    before = {name: tensor.clone() for name, tensor in weights(copy).items()}
    results = run.manifest["results"]
    assert results["best_epoch"] == run.manifest["epochs"]
    (copy / "model.safetensors").write_bytes(b"x")
    (finding,) = (finding for finding in repair(copy) if finding.file == "model.safetensors")
    assert finding.remark == f"those of step {results['best_step']:,}, which had the best validation"
    for name, tensor in before.items():
        assert torch.equal(weights(copy)[name], tensor)
    assert unrolled.load(copy).manifest["results"] == results
    assert unrolled.load(copy).evaluate()["nll_nats"] == results["test"]["nll_nats"]


WORSE = {"training.schedule": "exponential", "training.learning_rate": 0.003, "training.final_learning_rate": 0.9}
"""From epoch to epoch."""


def test_results_are_those_of_the_weights_even_after_a_repair(tmp_path: Path) -> None:
    run = unrolled.train("demo", data="toy", out=tmp_path / "run", changes=SMALL | WORSE)
    assert run.manifest["results"]["best_epoch"] == 1
    (run.path / "model.safetensors").write_bytes(b"x")
    repair(run.path)
    assert "results" not in folder.read_manifest(run.path)
    results = unrolled.train(None, out=run.path, resume=True).manifest["results"]
    assert results["best_epoch"] == 2
    assert results["valid"]["perplexity"] == pytest.approx(results["valid_perplexity"], rel=0.05)
    longer = unrolled.train(None, out=run.path, resume=True, changes={"training.max_epochs": 3}).manifest["results"]
    assert longer["best_epoch"] == 3  # whatever it is: the lost weights' figure stands in nobody's way


def test_a_repair_that_is_broken_off_leaves_no_results_of_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "run"
    unrolled.train("demo", data="toy", out=copy, changes=SMALL | WORSE)
    (copy / "model.safetensors").write_bytes(b"x")

    def broken_off(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(folder, "write_tensors", broken_off)
        with pytest.raises(KeyboardInterrupt):
            repair(copy)
    assert "results" not in folder.read_manifest(copy)
    repair(copy)
    assert unrolled.load(copy).score("the dog").tokens == 3


def test_first_weights_beyond_all_bounds_are_refused() -> None:
    with pytest.raises(UnrolledError, match="forget-bias"):
        load_recipe("demo").changed({"model.forget_bias": "1e300"})


def test_what_a_killed_preparation_left_is_taken_away_in_time(cache: Path, write: Callable[..., Path]) -> None:
    left, fresh = (cache / "ids" / f".incoming-{name}" for name in ("old", "new"))
    for folder_left in (left, fresh):
        folder_left.mkdir(parents=True)
    os.utime(left, (0, 0))
    prepare(open_corpus(str(write("other.txt", "x y z\n" * 500))), Vocabulary("word"))
    assert not left.exists()
    assert fresh.exists()


def test_a_folder_with_a_users_own_recipe_is_not_taken(tmp_path: Path) -> None:
    own = tmp_path / "recipe.toml"
    own.write_text("# mine\n[training]\nmax_epochs = 1\n")
    with pytest.raises(UnrolledError, match="exists already"):
        unrolled.train(str(own), data="toy", out=tmp_path, changes=SMALL)
    assert own.read_text().startswith("# mine")


def test_a_missing_manifest_is_named_and_repaired(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(UnrolledError, match=r"manifest\.json is missing; unrolled repair"):
        unrolled.load(copy)
    repair(copy)
    assert unrolled.load(copy).score("the dog").tokens == 3


def test_the_largest_seed_samples_too(tmp_path: Path) -> None:
    seed = {"training.seed": (1 << 63) - 1, "training.max_epochs": 1}
    assert unrolled.train("demo", data="toy", out=tmp_path / "run", changes=SMALL | seed).manifest["status"] == "done"


def test_two_trainings_without_a_name_take_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(folder.reserve, ["demo"] * 8))
    assert {path.name for path in taken} == {f"demo-{number}" for number in range(1, 9)}


def test_a_small_disk_that_fills_up_loses_nothing(tmp_path: Path) -> None:
    """A real one, of memory, with room for less and for more, so that different writes meet its end."""
    sizes = {"model.hidden_sizes": "64", "model.embedding_size": 64, "training.schedule": "decay"}
    large = SMALL | sizes
    with disk_of_memory(tmp_path / "disk", "size=4m") as disk:
        path, filler = disk / "run", disk / "filler"
        command = [sys.executable, "-m", "unrolled", "train", "--resume", "--out", path, "--training.save-every", "1"]

        def go_on() -> subprocess.CompletedProcess[str]:
            options = {"capture_output": True, "text": True, "check": False, "env": ENVIRONMENT}
            return subprocess.run([*command, "--max-epochs", "2"], **options)

        unbroken = unrolled.train("demo", data="toy", out=tmp_path / "unbroken", changes=large)
        unrolled.train("demo", data="toy", out=path, changes=large | {"training.max_epochs": 1})
        for left in (0, 20_000, 300_000):
            usage = shutil.disk_usage(disk)
            filler.write_bytes(bytes(max(usage.free - left, 0) // 4096 * 4096))
            done = go_on()
            assert done.returncode == 2, done.stderr
            assert done.stderr.splitlines()[-1].startswith(f"unrolled: No space left on device: {path}")
            assert "Traceback" not in done.stderr
            filler.unlink()
        done = go_on()
        assert done.returncode == 0, done.stderr
        mine, theirs = weights(path), weights(unbroken.path)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@contextmanager
def disk_of_memory(path: Path, option: str) -> Iterator[Path]:
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", path], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no disk of memory can be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def test_a_folder_that_vanishes_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run"

    def progress(event: dict[str, Any]) -> None:
        if event.get("step") == 5 and event["event"] == "step":
            shutil.rmtree(path)

    with pytest.raises((UnrolledError, OSError)) as caught:  # the command makes a line of either
        unrolled.train("demo", data="toy", out=path, changes=SMALL, progress=progress)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    with disk_of_memory(tmp_path / "disk", "ro") as disk:
        command = [sys.executable, "-m", "unrolled", "train", "--data", "toy", "--out", disk / "run"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"unrolled: Read-only file system: {disk / 'run'}"
    assert "epoch" not in done.stderr


def test_what_is_being_read_is_never_half_written(tmp_path: Path) -> None:
    path, ends, seen = tmp_path / "file", threading.Event(), set()
    contents = [bytes([number]) * 100_000 for number in range(2)]
    write_whole(path, contents[0])

    def read() -> None:
        while not ends.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(100):
            write_whole(path, contents[number % 2])
    finally:
        ends.set()
        reader.join()
    assert seen <= set(contents)


# ------------------------------------------------------------------------------------------------ damage


FILES = ["recipe.toml", "tokenizer.json", "heldout.safetensors", "manifest.json", "model.safetensors"]
FILES += ["last/resume.safetensors"]


def harm(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    {
        "flipped": lambda: file.write_bytes(content),
        "truncated": lambda: os.truncate(file, file.stat().st_size // 3),
        "empty": lambda: os.truncate(file, 0),
        "missing": file.unlink,
    }[how]()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "missing"])
def test_one_damaged_file_is_named_and_repaired(copy: Path, name: str, how: str) -> None:
    before = unrolled.load(copy).score("the dog").log_prob
    harm(copy / name, how)
    if name != "last/resume.safetensors":
        with pytest.raises(UnrolledError, match=Path(name).name):
            unrolled.load(copy).evaluate() and unrolled.load(copy).model
    elif how != "missing":  # then the point before it is taken
        with pytest.raises(UnrolledError, match=r"resume\.safetensors is damaged.*unrolled repair"):
            unrolled.train(None, out=copy, resume=True)
    found = {finding.file: finding.state for finding in repair(copy)}
    assert found.pop(name) == "repaired"
    assert set(found.values()) == {"whole"}
    assert {finding.state for finding in repair(copy)} == {"whole"}
    after = unrolled.load(copy).score("the dog").log_prob
    assert after == pytest.approx(before) or name == "model.safetensors"
    assert unrolled.train(None, out=copy, resume=True, changes={"training.max_epochs": 3}).manifest["epochs"] == 3


def test_what_cannot_be_repaired_is_said(copy: Path) -> None:
    for name in ("tokenizer.json", "heldout.safetensors", "last/resume.safetensors", "last/previous.safetensors"):
        harm(copy / name, "flipped")
        if (twin := copy / "last" / "copies" / name).exists():
            harm(twin, "flipped")
    found = {finding.file: (finding.state, finding.remark) for finding in repair(copy)}
    assert found["tokenizer.json"][0] == found["last/resume.safetensors"][0] == "lost"
    assert found["heldout.safetensors"] == ("lost", "evaluate needs the text: --data")
    for name in ("manifest.json", "last/copies/manifest.json"):
        harm(copy / name, "truncated")
    with pytest.raises(UnrolledError, match=r"neither manifest\.json nor its copy is whole"):
        repair(copy)


def test_a_damaged_line_of_the_record_is_found(copy: Path) -> None:
    lines = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    digit = lines[1].index(b'"train_perplexity": ') + 20
    lines[1] = lines[1][:digit] + bytes([lines[1][digit] ^ 1]) + lines[1][digit + 1 :]
    (copy / "metrics.jsonl").write_bytes(b"".join(lines) + b'{"step": 9')
    assert damaged_metrics(copy) == [2, len(lines) + 1]
    (finding,) = (finding for finding in repair(copy) if finding.file == "metrics.jsonl")
    assert finding.remark == f"without its damaged lines 2, {len(lines) + 1}"
    assert (copy / "metrics.jsonl.damaged").read_bytes() == b"".join(lines) + b'{"step": 9'
    assert len(read_metrics(copy)) == len(lines) - 1


def test_a_record_without_its_epochs_is_lost(copy: Path) -> None:
    (copy / "metrics.jsonl").write_bytes(b"")
    (finding,) = (finding for finding in repair(copy) if finding.file == "metrics.jsonl")
    assert (finding.state, finding.remark) == ("lost", "no epoch is left in it; the weights can still be used")


def test_records_from_before_there_were_sums_are_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1}\n{"step": 2, "epoch": 1}\n')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    append_metrics(tmp_path, {"step": 3, "epoch": 1})
    assert read_metrics(tmp_path)[-1] == {"step": 3, "epoch": 1}


def test_files_of_another_run_with_the_same_sizes_are_refused(copy: Path, toy_run: Run, tmp_path: Path) -> None:
    values = {name: toy_run.recipe.value(name) for name in ("model.embedding_size", "training.learning_rate")}
    changes = values | {"model.hidden_sizes": "64,48", "training.max_epochs": 1, "training.seed": 2}
    other = unrolled.train("demo", data="toy", out=tmp_path / "other", changes=changes)
    for name in ("model.safetensors", "last/resume.safetensors"):
        shutil.copy(other.path / name, copy / name)
    with pytest.raises(UnrolledError, match=r"model\.safetensors is of another run"):
        unrolled.load(copy).model  # noqa: B018
    with pytest.raises(UnrolledError, match=r"resume\.safetensors is of another run"):
        unrolled.train(None, out=copy, resume=True, changes={"training.max_epochs": 3})
    assert {finding.state for finding in repair(copy)} == {"whole", "repaired"}


# ------------------------------------------------------------------------------------------------ numerical accidents


def epoch_with(spoil: Callable[[int, LanguageModel], None], steps: int = 8) -> tuple[LanguageModel, Position]:
    """Some steps of a tiny model; `spoil(step, model)` is called after each."""
    torch.manual_seed(0)
    recipe = Recipe().changed({"training.batch_size": 2, "training.num_steps": 3, "training.precision": "f32"})
    model, position = LanguageModel(11, 4, [5]), Position()
    windows = Windows(torch.randint(11, (200,)).numpy(), 2, 3)

    def after_step(states: object, figures: dict[str, float]) -> bool:
        spoil(position.step, model)
        return position.step < steps

    run_epoch(
        model,
        make_optimizer(model, recipe.training),
        windows,
        model.initial_state(2),
        recipe.training,
        position,
        after_step,
    )
    return model, position


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_reaches_no_weights(value: float) -> None:
    kept: dict[str, torch.Tensor] = {}

    def spoil(step: int, model: LanguageModel) -> None:
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: gradient * value if step in (3, 4) else gradient)
        if step == 3:
            kept.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        if step == 5:
            assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())

    model, position = epoch_with(spoil)
    assert position.skipped > 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("save_every", [0, 1])
def test_weights_that_are_spoilt_are_taken_back_and_the_rate_is_lowered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int
) -> None:
    """NaN in the weights, as a broken memory would have it: back to the resume point, on at half the rate."""
    notes: list[str] = []
    models: list[LanguageModel] = []
    original, changes = LanguageModel.nll, SMALL | {"training.save_every": save_every}
    monkeypatch.setattr(LanguageModel, "nll", lambda self, *rest: models.append(self) or original(self, *rest))

    def progress(event: dict[str, Any]) -> None:
        if event["event"] == "note":
            notes.append(event["text"])
        if event["event"] == "step" and event["step"] == 50 and not any("back to step" in note for note in notes):
            with torch.no_grad():
                models[-1].layers[0].weight_hh[0, 0] = math.nan

    run = unrolled.train("demo", data="toy", out=tmp_path / "run", changes=changes, progress=progress)
    assert run.manifest["status"] == "done"
    assert run.manifest["skipped_steps"] == MOST_SKIPPED
    assert any("step 51 is not taken" in note for note in notes)
    assert any("the rate now 0.5 of the recipe's" in note for note in notes)
    assert all(tensor.isfinite().all() for tensor in weights(run.path).values())
    assert [record["skipped"] for record in read_metrics(run.path) if "skipped" in record] == []  # cut with the rest


def test_what_never_becomes_finite_stops_with_the_reason_and_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, original = tmp_path / "run", LanguageModel.nll

    def broken(self: LanguageModel, *rest: Any) -> Any:
        nll, count, states = original(self, *rest)
        return nll * math.nan, count, states

    monkeypatch.setattr(LanguageModel, "nll", broken)
    with pytest.raises(UnrolledError, match=rf"{MOST_SKIPPED} steps in a row up to .* lower --training.learning-rate"):
        unrolled.train("demo", data="toy", out=path, changes=SMALL)
    manifest = folder.read_manifest(path)
    assert manifest["status"] == "stopped"
    assert "had no finite loss and gradient, at 0.125 of the recipe's rate" in manifest["reason"]
    assert manifest["skipped_steps"] == MOST_SKIPPED * (MOST_ROLLBACKS + 1)
    monkeypatch.undo()
    assert unrolled.train(None, out=path, resume=True).manifest["status"] == "done"


@pytest.mark.parametrize("cell", ["lstm", "elman"])
def test_a_rate_of_a_thousand_never_writes_what_is_not_finite(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "run"
    changes = SMALL | {"training.optimizer": "sgd", "training.learning_rate": 1000.0, "model.cell": cell}
    changes |= {"training.schedule": "decay", "training.max_grad_norm": 1e6}
    with suppress(UnrolledError):  # it may get to its end, or be told to lower the rate
        unrolled.train("demo", data="toy", out=path, changes=changes)
    for name in ("last/resume.safetensors", "model.safetensors"):
        if (path / name).exists():  # the best weights are there after an epoch
            tensors, _ = read_tensors(path / name)
            assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())
    assert (path / "last/resume.safetensors").exists()


# ------------------------------------------------------------------------------------------------ memory, determinism


def test_what_cannot_fit_is_refused_with_an_estimate(tmp_path: Path) -> None:
    refused = pytest.raises(UnrolledError, match=r"this takes [\d,.]+ GiB of memory or more, and the machine has")
    for changes in ({"model.hidden_sizes": "300000"}, {"model.embedding_size": 10**9}):
        with refused:
            unrolled.train("demo", data="toy", out=tmp_path / "run", changes=changes)
    assert not (tmp_path / "run").exists()
    many_streams = load_recipe("ptb-small").changed({"training.batch_size": 10**8})
    with refused:
        refuse_what_cannot_fit(memory_needed(many_streams, 10_000))


def test_other_numbers_of_threads_round_otherwise_and_no_more(tmp_path: Path) -> None:
    runs = {}
    for name, count in (("one", 1), ("two", 2), ("two again", 2)):
        torch.set_num_threads(count)
        try:
            runs[name] = unrolled.train("demo", data="toy", out=tmp_path / name, changes=SMALL)
        finally:
            torch.set_num_threads(1)
    two, again = (weights(runs[name].path) for name in ("two", "two again"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in two.items())
    figures = [run.manifest["results"]["test"]["perplexity"] for run in runs.values()]
    assert figures[1] == pytest.approx(figures[0], rel=0.01)
    assert json.loads((runs["one"].path / "manifest.json").read_text())["hardware"]["threads"] == 1


# ------------------------------------------------------------------------------------------------ strangers


@pytest.fixture(scope="session")
def victims(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    prepare_folder(folder)
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_files_from_strangers_are_harmless(victims: Path, tmp_path: Path, target: str) -> None:
    shutil.copytree(victims, tmp_path, dirs_exist_ok=True)
    assert run_cases(tmp_path, target, seed=0, count=50) == (50, [])


@given(content=one_of(binary(max_size=300), text(max_size=300).map(lambda text: text.encode(errors="surrogatepass"))))
def test_any_bytes_are_a_recipe_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_bytes(content)
    with suppress(UnrolledError):
        assert load_recipe(file).to_toml()


VALUES = recursive(
    one_of(none(), booleans(), integers(), floats(), text(max_size=20)),
    lambda inner: one_of(lists(inner, max_size=3), dictionaries(text(max_size=10), inner, max_size=3)),
    max_leaves=5,
)


@given(name=sampled_from(FIELDS), value=VALUES)
def test_any_value_of_a_field_is_taken_or_refused(name: str, value: Any) -> None:
    with suppress(UnrolledError):
        recipe = Recipe().changed({name: value})
        assert Recipe.model_validate(tomllib.loads(recipe.to_toml())) == recipe


@given(line=one_of(VALUES.map(json.dumps), text(max_size=100)))
def test_any_line_is_an_item_or_refused(line: str) -> None:
    for read in (plain_item, nbest_item, json_item("text", "id", "score")):
        with suppress(UnrolledError):
            assert isinstance(read(1, line).text, str)


@given(line=text(max_size=60))
def test_any_text_is_scored_or_refused(toy_run: Run, line: str) -> None:
    (result,) = toy_run.score_many([line])
    assert isinstance(result, UnrolledError) or math.isfinite(result.log_prob)
