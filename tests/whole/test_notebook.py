"""In a notebook, answers show themselves, and a training as it goes: in a real kernel."""

import math
import os

import nbclient
import nbformat
import pytest

import unrolled
from unrolled.inference.shown import prediction_html, score_html
from unrolled.progress import Notebook


@pytest.fixture(scope="module")
def outputs(toy_run: unrolled.Run, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each cell shows as HTML."""
    folder = tmp_path_factory.mktemp("notebook")
    cells = [
        f"import unrolled\nrun = unrolled.load({str(toy_run.path)!r})\nrun",
        "run.predict('the', 3)",
        "run.score('the dog <b>')",
        f"small = {{'training.max_epochs': 2, 'model.hidden_sizes': '8', 'model.embedding_size': 8}}\n"
        f"run = unrolled.train('demo', data='toy', out={str(folder / 'run')!r}, changes=small, "
        "progress=unrolled.Notebook())",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    nbclient.NotebookClient(notebook, timeout=300).execute(env=environment)
    return ["".join(o.get("data", {}).get("text/html", "") for o in cell.outputs) for cell in notebook.cells]


def test_answers_and_a_training_show_themselves(outputs: list[str], toy_run: unrolled.Run) -> None:
    run, prediction, score, training = outputs
    assert f"{len(toy_run.tokenizer)} words" in run
    assert f"{toy_run.manifest['results']['test']['perplexity']:.2f}" in run
    for word, probability in toy_run.predict("the", 3).words:
        assert f">{word}</td><td>{100 * probability:.1f} %" in prediction
    assert score.count("<span") == 4
    assert "1 unknown" in score
    assert "<b>" not in score
    assert training.count("<tr>") == 3
    assert training.count("<polyline") == 2


def test_what_cannot_be_counted_is_shown_all_the_same() -> None:
    assert "&lt;script&gt;" in prediction_html("<script>", [])
    assert "inf" in score_html([("a", -math.inf)], 0, math.inf)
    assert "0 tokens" in score_html([], 0, None)
    shown = Notebook()
    for epoch, value in enumerate((5.0, math.inf, 4.0), start=1):
        shown.epochs.append(
            {"epoch": epoch, "train_perplexity": value, "valid_perplexity": value, "elapsed_s": 1.0, "best": False}
        )
    assert shown._repr_html_().count("<polyline") == 2
