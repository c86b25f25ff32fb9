"""The run folder: self-sufficient, whole, known by its hashes."""

import json
import os
import pickle
import shutil
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch

import unrolled
from unrolled import Run, UnrolledError
from unrolled import folder as folder_module
from unrolled.files import write_whole
from unrolled.kernels import build
from unrolled.nn.stream import Stream


@pytest.fixture
def copy(toy_run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_run.path, tmp_path / "run"))


def test_the_folder_holds_what_the_design_says(toy_run: Run) -> None:
    names = {
        "recipe.toml",
        "tokenizer.json",
        "model.safetensors",
        "heldout.safetensors",
        "metrics.jsonl",
        "manifest.json",
    }
    assert {path.name for path in toy_run.path.iterdir()} == names | {"last"}
    assert {path.name for path in (toy_run.path / "last").iterdir()} == {
        "resume.safetensors",
        "previous.safetensors",
        "copies",
    }
    manifest = toy_run.manifest
    assert manifest["status"] == "done"
    assert manifest["hardware"]["cores"] == os.cpu_count()
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["num_parameters"] == toy_run.model.num_parameters()


def test_others_can_read_the_tokenizer_and_the_weights(toy_run: Run) -> None:
    library = tokenizers.Tokenizer.from_file(str(toy_run.path / "tokenizer.json"))
    assert library.encode("the dog walks\n").ids == toy_run.tokenizer.encode("the dog walks\n").tolist()
    weights = safetensors.torch.load_file(toy_run.path / "model.safetensors")
    torch.testing.assert_close(weights["decoder.weight"], toy_run.model.decoder.weight.data)


def test_a_moved_folder_is_all_that_is_needed(copy: Path, toy_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNROLLED_CACHE", str(copy / "no-cache"))
    monkeypatch.chdir(copy.parent)
    moved = unrolled.load("run")
    assert moved.predict("the dog").words == toy_run.predict("the dog").words
    assert moved.evaluate()["nll_nats"] == toy_run.evaluate()["nll_nats"]
    assert moved.generate("the", length=20, seed=1) == toy_run.generate("the", length=20, seed=1)


@pytest.mark.parametrize("kernels", [True, False])
def test_in_bf16_the_answers_are_nearly_the_same(toy_run: Run, character_run: Run, kernels: bool) -> None:
    with nullcontext() if kernels else build.switched_off():
        for run in (toy_run, character_run):
            rounded = unrolled.load(run.path, precision="bf16")
            exact, near = run.evaluate(), rounded.evaluate()
            assert (exact["precision"], near["precision"]) == ("f32", "bf16")
            assert near["perplexity"] == pytest.approx(exact["perplexity"], rel=0.01)
            assert rounded.score("the").log_prob == pytest.approx(run.score("the").log_prob, rel=0.02)
            for (word, value), (other, nearly) in zip(
                run.predict("the").words, rounded.predict("the").words, strict=True
            ):
                assert nearly == pytest.approx(value, rel=0.05, abs=0.005) or word != other
            texts = [rounded.generate("the", length=20, seed=seed) for seed in range(5)]
            assert texts == [rounded.generate_many("the", 1, length=20, seed=seed)[0] for seed in range(5)]
            with rounded.rounded():
                stream = Stream(rounded.model, rounded.model.initial_state(1))
                expected = stream.read(torch.tensor([1]))
                again = Stream(rounded.model, rounded.model.initial_state(1))
            assert torch.equal(again.read(torch.tensor([1])), expected)
    with pytest.raises(UnrolledError, match="no precision 'f16'; it is f32 or bf16"):
        unrolled.load(toy_run.path, precision="f16")


def test_the_heldout_text_may_be_taken_away(copy: Path) -> None:
    (copy / "heldout.safetensors").unlink()
    run = unrolled.load(copy)
    assert run.predict("the dog").words
    with pytest.raises(UnrolledError, match="was taken away; pass the text with --data"):
        run.evaluate()
    assert run.evaluate(data="toy")["tokens"] > 0


@pytest.mark.parametrize("name", ["recipe.toml", "tokenizer.json", "model.safetensors", "manifest.json"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(UnrolledError, match=name):
        unrolled.load(copy).model  # noqa: B018


@pytest.mark.parametrize(
    "name", ["recipe.toml", "tokenizer.json", "model.safetensors", "heldout.safetensors", "manifest.json"]
)
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_flipped_bit_is_found_and_named(copy: Path, name: str, place: float) -> None:
    content = bytearray((copy / name).read_bytes())
    content[int(len(content) * place)] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(UnrolledError, match=name):
        unrolled.load(copy).evaluate()


@pytest.mark.parametrize("name", ["recipe.toml", "tokenizer.json", "model.safetensors", "manifest.json"])
def test_a_truncated_file_is_found_and_named(copy: Path, name: str) -> None:
    os.truncate(copy / name, (copy / name).stat().st_size // 2)
    with pytest.raises(UnrolledError, match=name):
        unrolled.load(copy).model  # noqa: B018


def test_weights_of_another_model_are_refused(copy: Path, character_run: Run) -> None:
    shutil.copy(character_run.path / "model.safetensors", copy)
    with pytest.raises(UnrolledError, match=r"model\.safetensors is of another run"):
        unrolled.load(copy).model  # noqa: B018


def test_held_out_ids_of_another_run_are_refused(copy: Path, character_run: Run) -> None:
    shutil.copy(character_run.path / "heldout.safetensors", copy)
    with pytest.raises(UnrolledError, match=r"heldout\.safetensors is damaged or was changed"):
        unrolled.load(copy).evaluate()


def test_a_resume_point_of_another_run_is_refused(copy: Path, character_run: Run) -> None:
    shutil.copy(character_run.path / "last/resume.safetensors", copy / "last")
    with pytest.raises(UnrolledError, match=r"resume\.safetensors is of another run"):
        unrolled.train(None, out=copy, resume=True)


def test_a_newer_format_says_so(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    folder_module.write_manifest(copy, manifest | {"format": 99})
    with pytest.raises(UnrolledError, match="made by a newer Unrolled"):
        unrolled.load(copy)


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_what_is_no_run_folder_is_said(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnrolledError, match=r"no run folder|is not a run folder"):
        unrolled.load(tmp_path / name)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert folder_module.latest_folder("demo") is None
    assert folder_module.next_folder("demo") == Path("runs/demo-1")
    for name in ("demo-1", "demo-9", "demo-10", "demo-x", "demo-small-40"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert folder_module.next_folder("demo") == Path("runs/demo-11")
    assert folder_module.latest_folder("demo") == Path("runs/demo-10")


def test_what_pytorch_makes_unless_told_otherwise_has_no_say(toy_run: Run, tmp_path: Path) -> None:
    small = {"model.embedding_size": 8, "model.hidden_sizes": "8", "training.max_epochs": 1, "model.dropout": 0.2}
    torch.set_default_dtype(torch.float64)
    try:
        run = unrolled.load(toy_run.path)
        assert run.predict("the dog") == toy_run.predict("the dog")
        assert run.score("the dog") == toy_run.score("the dog")
        assert run.generate("the", seed=1, repetition_penalty=1.1) == toy_run.generate(
            "the", seed=1, repetition_penalty=1.1
        )
        assert run.continuations("the") == toy_run.continuations("the")
        unrolled.train("demo", data="toy", out=tmp_path / "run", changes=small)
    finally:
        torch.set_default_dtype(torch.float32)
    resumed = unrolled.train(out=tmp_path / "run", resume=True, changes={"training.max_epochs": 2})
    assert resumed.manifest["status"] == "done"


def test_pytorchs_generator_stands_where_it_stood(toy_run: Run, tmp_path: Path) -> None:
    small = {"model.embedding_size": 8, "model.hidden_sizes": "8", "training.max_epochs": 1}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    unrolled.load(toy_run.path).predict("the")
    unrolled.train("demo", data="toy", out=tmp_path / "run", changes=small)
    assert torch.equal(torch.rand(1), expected)


def test_a_run_goes_to_another_process_and_may_be_copied(toy_run: Run) -> None:
    run = unrolled.load(toy_run.path, precision="bf16")
    for other in (pickle.loads(pickle.dumps(run)), deepcopy(run)):
        assert other.precision == "bf16"
        assert other.predict("the dog") == run.predict("the dog")
