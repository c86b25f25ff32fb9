"""What happens before the loop: datasets of any vocabulary, devices, precision, memory."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import unrolled
from unrolled import Recipe, UnrolledError
from unrolled.kernels import build
from unrolled.nn import rounding
from unrolled.run import build_model, pick_device
from unrolled.training.start import memory_needed, settle_precision


def test_a_vocabulary_beyond_two_bytes_is_held_out_and_evaluated(
    write: Callable[[str, bytes | str], Path], tmp_path: Path
) -> None:
    words = " ".join(f"w{number}" for number in range(70_000))
    path = write("many.txt", f"{words}\n{'w1 w2 w3 ' * 5_000}\n")
    small = {"model.embedding_size": 2, "model.hidden_sizes": "2", "training.max_epochs": 1, "data.vocab_size": 0}
    run = unrolled.train("demo", data=str(path), out=tmp_path / "run", changes=small | {"data.min_count": 1})
    assert len(run.tokenizer) > 65_536
    assert run.evaluate()["tokens"] == run.manifest["corpus"]["splits"]["test"]["tokens"] - 1


@pytest.mark.parametrize(("cell", "kept"), [("lstm", 6), ("gru", 5)])
@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 2), ("adamw", 4)])
@pytest.mark.parametrize(("precision", "vocab_size"), [("f32", 1_000), ("bf16", 1_000), ("bf16", 100)])
def test_the_memory_needed_counts_every_parameter_and_the_exponentials_that_are_kept(
    cell: str, kept: int, optimizer: str, copies: int, precision: str, vocab_size: int
) -> None:
    changes = {"model.cell": cell, "model.hidden_sizes": "7,5", "training.optimizer": optimizer}
    recipe, tokens = Recipe().changed(changes | {"training.precision": precision}), 20 * 20
    weights = copies * build_model(recipe.model, vocab_size).num_parameters()
    exponentials = 2 * vocab_size if build.library() and (precision, vocab_size) == ("bf16", 1_000) else 0
    assert memory_needed(recipe, vocab_size) == 4 * weights + tokens * (exponentials + 4 * kept * (7 + 5))


def test_a_device_is_picked_by_name() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("abacus", "", "cuda:99", "meta", "cpu:7"):
        with pytest.raises(UnrolledError, match=f"no device '{name}' here"):
            pick_device(name)


@pytest.mark.parametrize("level", ["avx512-bf16", "avx512", "avx2"])
@pytest.mark.parametrize("pytorch", [True, False])
def test_without_kernels_auto_is_bf16_where_the_processor_and_pytorch_have_it(
    monkeypatch: pytest.MonkeyPatch, level: str, pytorch: bool
) -> None:
    monkeypatch.setattr(build, "processor_flags", lambda: build.LEVELS[level].flags)
    monkeypatch.setattr(rounding, "is_native", lambda: pytorch)
    cpu = torch.device("cpu")
    with build.switched_off():
        assert settle_precision("auto", cpu) == ("bf16" if level == "avx512-bf16" and pytorch else "f32")
        assert settle_precision("auto", torch.device("cuda")) == "f32"
        assert [settle_precision(asked, cpu) for asked in ("f32", "bf16")] == ["f32", "bf16"]
    if build.library() is not None:
        assert settle_precision("auto", cpu) == ("bf16" if build.multiplies_bf16() else "f32")


@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_who_asks_a_processor_for_the_bf16_that_it_has_not_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, multiplies: bool
) -> None:
    monkeypatch.setattr(build, "processor_multiplies_bf16", lambda: multiplies)
    events: list[dict[str, Any]] = []
    small = {"model.embedding_size": 2, "model.hidden_sizes": "2", "training.max_epochs": 1}
    changes = small | {"training.precision": precision, "training.batch_size": 200}
    unrolled.train("demo", data="toy", out=tmp_path / "run", changes=changes, progress=events.append)
    told = any("no instruction for bf16" in event.get("text", "") for event in events)
    assert told == (precision == "bf16" and not multiplies)


@pytest.mark.skipif(build.library() is None, reason="the kernels are not built: unrolled kernels build")
def test_which_kernels_a_training_ran_on_is_recorded_and_said_from_one_going_on_to_the_next(tmp_path: Path) -> None:
    said = list[str]()

    def listen(event: dict[str, Any]) -> None:
        said.append(event.get("text", ""))

    small = {"model.hidden_sizes": "4", "model.embedding_size": 4, "training.max_epochs": 1}
    run = unrolled.train("demo", data="toy", out=tmp_path / "run", changes=small)
    for epochs, native in ((2, False), (3, True)):
        with nullcontext() if native else build.switched_off():
            more = {"training.max_epochs": epochs}
            run = unrolled.train(out=run.path, resume=True, changes=more, progress=listen)
    history = f"{build.in_use()}, then none, then {build.in_use()}"
    assert run.manifest["versions"]["kernels"] == history
    assert run.manifest["precision"] == run.recipe.training.precision in ("f32", "bf16")
    assert f"the kernels of this run were {history}: it goes on, but not bit for bit" in said


def test_a_layer_without_a_kernel_is_named(tmp_path: Path) -> None:
    said = list[str]()
    jordan = {"model.cell": "jordan", "model.embedding_size": 0, "model.hidden_sizes": "4", "model.dropout": 0.0}
    unrolled.train(
        "demo", data="toy", out=tmp_path / "run", changes=jordan | {"training.max_epochs": 1},
        progress=lambda event: said.append(event.get("text", "")),
    )  # fmt: skip
    assert build.library() is None or any(
        "but for its jordan layer, which runs on PyTorch alone" in one for one in said
    )
