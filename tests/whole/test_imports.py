"""The house: who may import whom, what is public, what may touch the disk or print, what the command costs."""

import ast
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import unrolled

SOURCE = Path(unrolled.__file__).parent
MODULES = {
    path.relative_to(SOURCE).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(SOURCE.rglob("*.py"))
}
FREE = {"errors", "files", "threads"}
"""Below everything: they import nothing of ours, and anybody may import them."""
MAY_IMPORT: dict[str, set[str]] = {
    "data": {"data"},
    "kernels": {"kernels"},
    "nn": {"nn", "kernels"},
    "inference": {"inference", "data", "nn"},
    "recipe": set(),
    "metrics": set(),
    "folder": {"recipe", "data", "kernels/build", "metrics"},
    "repair": {"folder", "metrics", "training/resume"},
    "export": {"data/tokens", "nn"},
    "run": {"recipe", "data", "nn", "inference", "folder", "kernels/build", "export"},
    "training": {
        "training",
        "recipe",
        "data",
        "nn",
        "folder",
        "metrics",
        "run",
        "kernels",
        *("inference/evaluate", "inference/generate"),
    },
    "subjects": {"training", "recipe", "data", "nn", "run", "kernels"},
    "bench": {"folder", "kernels", "recipe", "subjects"},
    "items": {"inference/score"},
    "serving": {"serving", "run", "inference", "data/tokens", "nn", "metrics"},
    "progress": set(),
    "pictures": {"data/tokens", "metrics"},
    "report": {"run", "folder", "metrics", "inference", "recipe", "pictures"},
    "options": {"recipe"},
    "answers": {"metrics"},
    "commands": {"commands", "options", "answers"},
    "cli": {"commands", "answers"},
    "__main__": {"cli"},
    "__init__": set(),
}
PRINT = ("commands", "answers", "progress")
"""They alone write to the terminal; what a command needs it imports when it runs."""
ORDER = {
    "data": [
        "embedded",
        "archives",
        "reading",
        "incoming",
        "text",
        "words",
        "backends",
        "tokens",
        "dataset",
        "batches",
    ],
    "kernels": ["build", "ops", "update", "step"],
    "nn": ["cells", "rounding", "unroll", "loss", "dropout", "model", "stream"],
    "commands": ["kinds", "training", "measuring", "using", "looking"],
    "training": ["optim", "distributed", "resume", "start", "stop", "loop"],
    "serving": [
        "schema",
        "limits",
        "aside",
        "engine",
        "sessions",
        "writing",
        "service",
        "completions",
        "guard",
        "app",
        "server",
    ],
    "inference": [
        "evaluate",
        "reading",
        "shown",
        "score",
        "rescore",
        "detokenize",
        "sampling",
        "generate",
        "session",
        "embeddings",
    ],
}
"""Within a folder a module imports only those before it."""


def imports(tree: ast.AST, at_top_only: bool = False) -> set[str]:
    """The modules of ours that a module imports, as data/text."""
    found = set()
    for node in ast.iter_child_nodes(tree) if at_top_only else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "unrolled":
            base = "/".join((node.module or "").split(".")[1:])
            for alias in node.names:
                deeper = f"{base}/{alias.name}".lstrip("/")
                found.add(deeper if deeper in MODULES else base or "__init__")
        elif isinstance(node, ast.Import):
            found |= {"/".join(alias.name.split(".")[1:]) for alias in node.names if alias.name.startswith("unrolled")}
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith("__init__") or name == "__init__"])
def test_a_module_imports_only_what_its_room_may(module: str) -> None:
    room, _, name = module.partition("/")
    for other in imports(MODULES[module], at_top_only=room in (*PRINT, "__init__")) - {"", "__init__"}:
        if other in FREE:
            continue
        assert room not in FREE, f"{module} imports {other}"
        other_room, _, other_name = other.partition("/")
        assert {other, other_room} & MAY_IMPORT[room], f"{module} imports {other}"
        if room == other_room and name:
            assert ORDER[room].index(other_name) < ORDER[room].index(name), f"{module} imports {other}"


def test_every_module_has_its_place_in_the_order() -> None:
    for room, names in ORDER.items():
        assert {path.stem for path in (SOURCE / room).glob("*.py")} - {"__init__"} == set(names)


ON_DISK = {
    "bench",
    "data/archives",
    "data/dataset",
    "data/incoming",
    "data/reading",
    "data/text",
    "data/tokens",
    "files",
    "threads",
    "recipe",
    "folder",
    "metrics",
    "repair",
    "answers",
    "items",
    "cli",
    "pictures",
    "report",
    "export",
    "kernels/build",
    "serving/app",
}
WRITERS = ("write_text", "write_bytes", "write_whole", "written_whole", "unlink", "mkdir", "rename")
DISK_CALLS = {"open", "read_text", "read_bytes", "memmap", *WRITERS}


@pytest.mark.parametrize("module", MODULES)
def test_only_those_who_may_touch_the_disk_or_print(module: str) -> None:
    calls = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Call):
            calls.add(node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", ""))
    if module not in ON_DISK and module != "data/embedded":  # it reads this Python's own sources
        assert not calls & DISK_CALLS
    if module.partition("/")[0] not in PRINT:
        assert "print" not in calls


def test_the_network_and_the_optimiser_keep_to_their_rooms() -> None:
    for module, tree in MODULES.items():
        text = ast.unparse(tree)
        if module.startswith("nn/"):
            assert "optim." not in text
            assert "pathlib" not in text
        if not module.startswith("training/") and module != "subjects":  # where PyTorch is timed as others use it
            assert "torch.optim" not in text


def test_the_public_api_is_this_list() -> None:
    assert unrolled.__all__ == ["Notebook", "Recipe", "Run", "UnrolledError", "load", "load_recipe", "train"]
    for name in unrolled.__all__:
        assert getattr(unrolled, name).__doc__
    assert set(unrolled.__all__) <= set(dir(unrolled))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        unrolled.nothing  # noqa: B018


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["recipes"]])
def test_the_command_line_alone_needs_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys, unrolled.cli\n"
        f"try: unrolled.cli.main({arguments!r})\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'tokenizers', 'safetensors'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert done.stdout


def test_help_knows_nothing_of_a_recipe() -> None:
    """Whose fields take as long to define as all the rest of help; `train --help` alone shows them."""
    code = (
        "import sys, unrolled.cli\n"
        "try: unrolled.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('pydantic' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False"


def test_help_takes_less_than_half_a_second_of_processor_time() -> None:
    """Processor time, the least of five, so that what else the machine does has no say."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "unrolled", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.5


def imported_compiler(code: str, **environment: str) -> bool:
    """Whether a program ends with PyTorch's compiler imported, which takes a second and 70 MiB."""
    code += "\nimport sys; print('torch._dynamo' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()[-1] == "True"


def test_to_use_a_run_does_not_import_pytorchs_compiler(toy_run: unrolled.Run) -> None:
    code = f"import unrolled; run = unrolled.load({str(toy_run.path)!r}); run.predict('the'); run.evaluate()"
    assert not imported_compiler(code)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kernels", [{}, {"UNROLLED_KERNELS": "off"}], ids=["kernels", "PyTorch"])
def test_to_train_does_not_import_pytorchs_compiler(optimizer: str, kernels: dict[str, str], tmp_path: Path) -> None:
    changes = {"training.optimizer": optimizer, "training.max_epochs": 1, "model.hidden_sizes": "8"}
    code = (
        f"import unrolled; unrolled.train('demo', data='toy', out={str(tmp_path / 'run')!r}, changes={changes!r})\n"
        f"unrolled.train(out={str(tmp_path / 'run')!r}, resume=True, changes={{'training.max_epochs': 2}})"
    )
    assert not imported_compiler(code, **kernels)
