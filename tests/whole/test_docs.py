"""What README and docs say of the code is so."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import unrolled
from unrolled.cli import app
from unrolled.recipe import shipped_recipes

ROOT = Path(unrolled.__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (?:.*\| )?unrolled (.*?)(?:\s+#.*)?$", README, re.MULTILINE)


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_the_readme_is_one(command: str) -> None:
    app.parse_args(shlex.split(command), exit_on_error=False, print_error=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_readmes_tree_is_the_tree() -> None:
    folder, named = "", set()
    tree = README.split("src/unrolled/\n")[1].split("tests/ ")[0]
    for line in tree.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0] if line.split() else ""
        if name.endswith("/"):
            folder = name
        elif name.endswith(".py"):
            named.add((folder if indent > 2 else "") + name)
    source = Path(unrolled.__file__).parent
    files = {path.relative_to(source).as_posix() for path in source.rglob("*.py")}
    trivial = {
        f"{room}/__init__.py" for room in ("commands", "data", "kernels", "nn", "training", "inference", "serving")
    } | {"__main__.py"}
    assert named == files - trivial


def test_every_recipe_has_its_results() -> None:
    results = (ROOT / "docs/results/README.md").read_text(encoding="utf-8")
    for name in shipped_recipes():
        assert f"[`{name}`]" in results


def test_what_is_made_from_the_code_is_up_to_date(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    subprocess.run([sys.executable, ROOT / "docs/make.py", tmp_path], check=True)
    for name in ("commands.md", "windows.svg"):
        ours, made = (folder.joinpath(name).read_text(encoding="utf-8") for folder in (ROOT / "docs", tmp_path))
        assert ours == made, f"docs/{name} is out of date: make docs"
    pictures = {path.name for path in (tmp_path / "results").iterdir()}
    assert pictures == {path.name for path in (ROOT / "docs/results").glob("*.svg")}


def test_no_page_names_a_place_on_the_machine_that_made_it() -> None:
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*")]:
        if path.suffix in (".md", ".ipynb", ".jsonl", ".svg"):
            text = path.read_text(encoding="utf-8")
            assert "site-packages" not in text, path
            assert str(ROOT) not in text, path
