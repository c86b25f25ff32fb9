"""An exported file does what the model does, alone."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis.strategies import integers

import unrolled
from unrolled.data.backends import level_backend
from unrolled.data.tokens import Tokenizer
from unrolled.export import OnnxReader, export, onnx_model
from unrolled.nn.model import LanguageModel

WORDS = ["<unk>", "word", "<eos>", *(f"word{number}" for number in range(10))]
MODELS: dict[str, dict[str, Any]] = {
    "lstm": {"hidden_sizes": [7, 5], "embedding_size": 6},
    "lstm, two biases, drawn": {"hidden_sizes": [7], "embedding_size": 6, "join": "add", "draw_layer_biases": True},
    "lstm, tied": {"hidden_sizes": [9, 6], "embedding_size": 6, "tie_weights": True},
    "lstm, one-hot": {"hidden_sizes": [4, 3], "embedding_size": 0, "draw_decoder_bias": True},
    "gru": {"cell": "gru", "hidden_sizes": [7, 5], "embedding_size": 6, "draw_layer_biases": True},
    "elman": {"cell": "elman", "hidden_sizes": [7, 5], "embedding_size": 6},
    "elman, relu, two biases": {
        "cell": "elman",
        "hidden_sizes": [7],
        "embedding_size": 0,
        "activation": "relu",
        "join": "add",
        "draw_layer_biases": True,
    },
    "jordan": {"cell": "jordan", "hidden_sizes": [7], "embedding_size": 0, "draw_layer_biases": True},
    "jordan, relu": {"cell": "jordan", "hidden_sizes": [7], "embedding_size": 0, "activation": "relu"},
}


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(level_backend(WORDS, "word"), "word")


def model_of(options: dict[str, Any]) -> LanguageModel:
    torch.manual_seed(3)
    return LanguageModel(len(WORDS), init_scale=1.0, **options).eval()


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_file_says_what_the_model_says_window_after_window(options: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Any number of tokens and of streams; the state is carried as the model carries it."""
    model = model_of(options)
    made = onnx_model(model, tokenizer)
    onnx.checker.check_model(made, full_check=True)
    content = made.SerializeToString()

    @given(steps=integers(1, 9), streams=integers(1, 5), seed=integers(0, 99))
    def agrees(steps: int, streams: int, seed: int) -> None:
        reader, states = OnnxReader(content, streams), model.initial_state(streams)
        ids = np.random.default_rng(seed).integers(0, len(WORDS), (2, steps, streams))
        for window in ids:
            with torch.inference_mode():
                logits, states = model(torch.from_numpy(window), states)
            log_probs = torch.from_numpy(reader.read(window))
            torch.testing.assert_close(log_probs, logits.log_softmax(-1), rtol=1e-5, atol=2e-6)
        theirs = [torch.from_numpy(part) for part in reader.states.values()]
        for ours, other in zip((part for state in states for part in state), theirs, strict=True):
            torch.testing.assert_close(other, ours, rtol=1e-5, atol=2e-6)

    agrees()


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_in_eight_bits_every_row_is_within_half_a_step(
    options: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = model_of(options)
    with torch.no_grad():
        model.layers[0].weight_hh[1] = 0  # a row of zeros has no scale of its own
    made = onnx_model(model, tokenizer, int8=True)
    onnx.checker.check_model(made, full_check=True)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    narrow = [name.removesuffix(".int8") for name in stored if name.endswith(".int8")]
    assert len(narrow) >= 2
    plain = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx_model(model, tokenizer).graph.initializer
    }
    for name in narrow:
        assert stored[f"{name}.int8"].dtype == np.int8
        apart = np.abs(stored[f"{name}.int8"] * stored[f"{name}.scale"] - plain[name])
        assert (apart <= stored[f"{name}.scale"] * 0.5001).all()
    export(model, tokenizer, tmp_path / "mine.onnx", np.arange(len(WORDS)), int8=True)
    reader = OnnxReader((tmp_path / "mine.onnx").read_bytes())
    ids = np.arange(len(WORDS))[:, None]
    with torch.inference_mode():
        logits, _ = model(torch.from_numpy(ids), model.initial_state(1))
    apart = np.abs(reader.read(ids) - logits.log_softmax(-1).numpy())
    assert 0 < apart.max() < 0.3


def test_the_metadata_hold_the_tokenizer_and_the_token_before_a_text(tokenizer: Tokenizer) -> None:
    made = onnx_model(model_of(MODELS["lstm"]), tokenizer)
    found = {entry.key: entry.value for entry in made.metadata_props}
    assert found == {"tokenizer.json": tokenizer.to_json(), "start_id": "2"}


def test_the_command_writes_it_and_says_how_far_apart_they_are(
    toy_run: unrolled.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from unrolled.cli import main

    sizes = {}
    for name, options in {"a.onnx": [], "b.onnx": ["--int8"]}.items():
        with pytest.raises(SystemExit) as ended:
            main(["export", str(toy_run.path), str(tmp_path / name), *options, "--json"])
        assert ended.value.code == 0
        told = json.loads(capsys.readouterr().out)
        sizes[name] = (tmp_path / name).stat().st_size
        assert told["bytes"] == sizes[name]
        assert told["checked_on"] == "valid"
        assert told["perplexity"] == pytest.approx(told["onnx_perplexity"], rel=0.01 if options else 1e-5)
        assert 0 < told["largest_difference"] < 1e-4
        assert told["start_id"] == toy_run.tokenizer.start_id
        assert told["inputs"]["ids"] == ["T", "B"]
        assert told["outputs"]["log_probs"] == ["T", "B", len(toy_run.tokenizer)]
    assert sizes["b.onnx"] < 0.4 * sizes["a.onnx"]


def test_the_page_shows_a_program_that_needs_neither_this_package_nor_pytorch(
    toy_run: unrolled.Run, tmp_path: Path
) -> None:
    toy_run.export(tmp_path / "mine.onnx")
    page = Path(unrolled.__file__).parents[2].joinpath("docs/export.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    program += "\nimport sys\nassert not {'torch', 'unrolled'} & set(sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    shown = [line.rsplit(maxsplit=1) for line in done.stdout.splitlines()]
    expected = toy_run.predict("this is an", k=5, unknown=True).words
    assert [word for word, _ in shown] == [repr(word) for word, _ in expected]
    assert [float(figure) for _, figure in shown] == pytest.approx([figure for _, figure in expected], rel=1e-4)


def test_a_file_that_is_not_the_model_is_not_written(
    toy_run: unrolled.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = OnnxReader.read
    monkeypatch.setattr(OnnxReader, "read", lambda self, ids: read(self, ids) - 0.01)
    for int8 in (False, True):
        with pytest.raises(
            unrolled.UnrolledError, match=r"is not written: what ONNX Runtime makes of it is up to 0.01 off"
        ):
            toy_run.export(tmp_path / "mine.onnx", int8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("int8", [False, True])
def test_what_is_not_finite_is_not_written(int8: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = model_of(MODELS["lstm"])
    with torch.no_grad():
        model.layers[1].bias_ih[2] = torch.nan
    with pytest.raises(unrolled.UnrolledError, match="is not written"):
        export(model, tokenizer, tmp_path / "mine.onnx", np.arange(9), int8)


@pytest.mark.parametrize("int8", [False, True])
def test_a_model_in_which_rounding_grows_is_written_all_the_same(
    int8: bool, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Two that start a tenth of a millionth apart are soon in different places, so each stretch begins in one place."""
    torch.manual_seed(1)
    model = LanguageModel(len(WORDS), 20, [200], cell="elman", init_scale=0.3, tie_weights=False).eval()
    ids = np.random.default_rng(1).integers(0, len(WORDS), 400)
    told = export(model, tokenizer, tmp_path / "mine.onnx", ids, int8)
    assert told["largest_difference"] < 1e-3
    alone = OnnxReader((tmp_path / "mine.onnx").read_bytes()).read(ids[:, None])
    with torch.inference_mode():
        log_probs = model(torch.from_numpy(ids[:, None]), model.initial_state(1))[0].log_softmax(-1)
    assert np.abs(alone - log_probs.numpy()).max() > 0.1


@pytest.mark.parametrize("name", ["model.safetensors", "mine.txt", "onnx", "."])
def test_only_a_file_that_is_called_onnx_is_written(toy_run: unrolled.Run, name: str, tmp_path: Path) -> None:
    """A name mistyped must not cost the weights."""
    with pytest.raises(unrolled.UnrolledError, match=r"the name of an ONNX file ends in .onnx"):
        toy_run.export(tmp_path / name)


def test_left_to_itself_it_is_written_into_the_run_folder(toy_run: unrolled.Run, tmp_path: Path) -> None:
    path = Path(shutil.copytree(toy_run.path, tmp_path / "run"))
    run = unrolled.load(path)
    assert [run.export()["file"], run.export(int8=True)["file"]] == [
        str(path / "model.onnx"),
        str(path / "model-int8.onnx"),
    ]
    assert unrolled.load(path).predict("the").words


def test_a_model_too_large_for_the_format_is_refused_at_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = LanguageModel(50_000_000, 50, [8])
    for int8 in (False, True):
        with pytest.raises(unrolled.UnrolledError, match="holds less than 2 GiB"):
            export(model, tokenizer, tmp_path / "large.onnx", np.zeros(2), int8)
    assert list(tmp_path.iterdir()) == []


def test_without_held_out_ids_it_is_checked_on_others(character_run: unrolled.Run, tmp_path: Path) -> None:
    path = Path(shutil.copytree(character_run.path, tmp_path / "run"))
    (path / "heldout.safetensors").unlink()
    told = unrolled.load(path).export(tmp_path / "mine.onnx")
    assert (told["checked_on"], told["checked_tokens"]) == ("random", 500)
    assert told["largest_difference"] < 1e-4


def test_without_onnx_the_way_out_is_named(
    toy_run: unrolled.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "unrolled.export", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(unrolled.UnrolledError, match=re.escape("pip install 'unrolled[export]'")):
        toy_run.export(tmp_path / "mine.onnx")
