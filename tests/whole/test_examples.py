"""What is shown to those who learn runs from top to bottom."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_tour_runs_from_top_to_bottom() -> None:
    notebook: Any = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "docs")}}).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    for shown in ("(T, B)", "(T, B, E)", "(B, 4H)", "(T, B, V)", "global norm", "from zero"):
        assert shown in printed


def test_the_page_of_the_tour_is_the_notebook() -> None:
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    page = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    for cell in cells:
        assert "".join(cell["source"]) in page


def test_the_minimal_example_trains(tmp_path: Path) -> None:
    text = "the cat sat on the mat and the dog lay by the warm door\n" * 400
    (tmp_path / "mine.txt").write_text(text)
    command = [sys.executable, str(ROOT / "examples" / "minimal.py"), str(tmp_path / "mine.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:5]] == [
        "before training",
        *(f"epoch {number}" for number in range(1, 5)),
    ]
    assert float(lines[5].removeprefix("test perplexity ")) < 1.5
