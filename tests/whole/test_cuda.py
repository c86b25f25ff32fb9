"""On a GPU everything comes to what it is on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

import unrolled
from unrolled.nn.model import LanguageModel
from unrolled.run import pick_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

CELLS: list[dict[str, Any]] = [
    {"cell": "lstm"},
    {"cell": "gru"},
    {"cell": "elman", "activation": "relu"},
    {"cell": "elman", "join": "add"},
]


@pytest.mark.parametrize("options", CELLS, ids=str)
@pytest.mark.parametrize("embedding_size", [0, 24])
@pytest.mark.parametrize("bf16", [False, True])
def test_values_and_gradients_are_those_of_the_cpu(options: dict[str, Any], embedding_size: int, bf16: bool) -> None:
    torch.manual_seed(0)
    model = LanguageModel(400, embedding_size, [33, 17], init_scale=0.3, **options)
    ids, results = torch.randint(400, (12, 5)), []
    for device in ("cpu", "cuda"):
        model = model.to(pick_device(device))
        with torch.autocast(device, torch.bfloat16, enabled=bf16 and device == "cuda"):
            nll, _, states = model.nll(ids[:-1].to(device), ids[1:].to(device), model.initial_state(5))
        gradients = torch.autograd.grad(nll, list(model.parameters()))
        results.append([nll, *(part for state in states for part in state), *gradients])
    assert results[1][0].dtype == torch.float32
    for mine, theirs in zip(*results, strict=True):
        apart = (mine.double() - theirs.cpu().double()).norm() / mine.double().norm()
        assert apart < (0.03 if bf16 else 1e-4)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_fused_layer_has_the_precision_that_it_is_asked_for(bf16: bool) -> None:
    model = LanguageModel(400, 24, [33]).cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        outputs, states = model.hidden(torch.randint(400, (12, 5)).cuda(), model.initial_state(5))
    assert outputs.dtype == (torch.bfloat16 if bf16 else torch.float32)  # and not f16, as autocast has cuDNN
    assert all(part.dtype == torch.float32 for state in states for part in state)


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_a_training_ends_where_that_on_the_cpu_does(tmp_path: Path, precision: str) -> None:
    figures = []
    for device in ("cpu", "cuda"):
        changes = {"training.device": device, "training.precision": precision, "model.dropout": 0.0}
        changes |= {"model.embedding_size": 16, "model.hidden_sizes": "24", "training.max_epochs": 2}
        figures.append(unrolled.train("demo", data="toy", out=tmp_path / device, changes=changes).evaluate())
    assert figures[1]["perplexity"] == pytest.approx(figures[0]["perplexity"], rel=0.03)


def test_a_training_on_the_gpu_goes_on_after_a_break(tmp_path: Path) -> None:
    changes = {"training.device": "cuda", "model.embedding_size": 16, "model.hidden_sizes": "24"}
    changes |= {"training.max_epochs": 1}
    unrolled.train("demo", data="toy", out=tmp_path, changes=changes)
    run = unrolled.train(None, out=tmp_path, resume=True, changes={"training.max_epochs": 2})
    assert run.manifest["epochs"] == 2
