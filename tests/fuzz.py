"""Files from strangers are harmless. Run by a test with few cases, and for the record by hand with many:

python tests/fuzz.py [--cases 100000] [--seed 1] [TARGET…]

Real files are changed at random, in their bytes or, with hashes made to fit again, in their structure, and read. The
only things that may come of it are an answer or an `UnrolledError` (an `OSError` where the command makes one line of
it), in bounded time and memory. Cases run in child processes, so that a crash is found as well. Targets share the time
alike; some are a hundred times faster than others.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import unrolled
from unrolled import folder
from unrolled.data.dataset import prepare
from unrolled.data.text import open_corpus
from unrolled.data.tokens import Tokenizer, Vocabulary
from unrolled.errors import UnrolledError
from unrolled.files import cache_folder, sha256_of
from unrolled.recipe import load_recipe
from unrolled.repair import repair
from unrolled.report import write_report

CASES_A_CHILD, SECONDS_A_CHILD, SECONDS_A_CASE, MEMORY = 2_000, 20, 20, 3 << 30
ODD: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**40, 1.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "x", "\x00", "é" * 50, "../../etc/passwd", "-", "<unk>", [], {}, [[]], {"": {}}, [1, "a"], "9" * 5000),
]


ODD_BYTES = (b"\x00", b"\xff\xfe", b"{", b"[" * 2000, b'"', b"\n", b"= 1e999", b"[a]\n")
ODD_VALUES = ("-1", "0", "1e999", "nan", '""', "[]", "{}", "true", "[[1]]", "9" * 400, '"x"', "10000000")
NAMES = ("a.train.txt", "b.valid.txt", "c.test.txt", "../../x.train.txt", "/etc/x", "a" * 300)
TEXTS = (b"the dog walks\n" * 40, bytes(range(256)) * 4, "\u00e9\u4e2d\U0001f600 a\u200bb\r\n".encode() * 30, b"")
MEMBERS = (tarfile.REGTYPE,) * 5 + (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)


class Fuzz:
    """A small trained run and the files that its reading begins with."""

    def __init__(self, into: Path, seed: int) -> None:
        self.into, self.chance = into, random.Random(seed)

    # -------------------------------------------------------------------------------------------- changes

    def bytes_changed(self, content: bytes) -> bytes:
        """Some bytes flipped, taken out, doubled, put elsewhere, or replaced."""
        chance, data = self.chance, bytearray(content)
        for _ in range(chance.choice((1, 1, 2, 5, 20))):
            at, length = chance.randrange(len(data) + 1), min(chance.choice((1, 2, 8, 100)), len(data))
            how = chance.randrange(6)
            if how == 0 and data:
                data[at % len(data)] ^= 1 << chance.randrange(8)
            elif how == 1:
                del data[at : at + length]
            elif how == 2:
                data[at:at] = data[at : at + length]
            elif how == 3:
                data[at : at + length] = chance.randbytes(length)
            elif how == 4:
                del data[at:]
            else:
                data[at:at] = chance.choice(
                    (b"\x00", b"\xff\xfe", b"{", b"[" * 2000, b'"', b"\n", b"= 1e999", b"[a]\n")
                )
        return bytes(data)

    def tree_changed(self, tree: Any) -> Any:
        """Some nodes of what JSON holds replaced by odd ones, taken out, renamed, or exchanged."""
        chance, tree = self.chance, json.loads(json.dumps(tree))
        for _ in range(chance.choice((1, 1, 2, 5))):
            node, parents = tree, []
            while isinstance(node, dict | list) and node and (not parents or chance.random() < 0.75):
                key = chance.choice(list(node) if isinstance(node, dict) else list(range(len(node))))
                parents.append((node, key))
                node = node[key]
            if not parents:
                return copy.deepcopy(chance.choice(ODD))
            parent, key = parents[-1]
            how = chance.randrange(5)
            if how == 0:
                del parent[key]
            elif how == 1 and isinstance(parent, dict):
                parent[chance.choice(("", "x", "\x00", key + "x"))] = parent.pop(key)
            elif how == 2:
                other, place = chance.choice(parents)
                parent[key] = copy.deepcopy(other[place])
            else:
                parent[key] = copy.deepcopy(chance.choice(ODD))
        return tree

    # -------------------------------------------------------------------------------------------- targets

    def run_bytes(self) -> None:
        """Any file of a run folder, its bytes changed; hashes as they were."""
        path = self._copy()
        file = self.chance.choice([file for file in path.rglob("*") if file.is_file()])
        file.write_bytes(self.bytes_changed(file.read_bytes()))
        self._use(path)

    def manifest(self) -> None:
        """A manifest of other structure, whose hash fits."""
        path = self._copy()
        manifest = self.tree_changed(folder.read_manifest(path))
        if isinstance(manifest, dict):
            with contextlib.suppress(TypeError, ValueError):
                folder.write_manifest(path, manifest)
        self._use(path)

    def recipe_of_run(self) -> None:
        """A recipe of other content, whose hash fits."""
        path = self._copy()
        (path / "recipe.toml").write_bytes(self._recipe(path / "recipe.toml"))
        self._rehash(path, "recipe.toml")
        self._use(path)

    def tokenizer_of_run(self) -> None:
        """A tokenizer of other structure, whose hash fits."""
        path = self._copy()
        tree = self.tree_changed(json.loads((path / "tokenizer.json").read_text()))
        (path / "tokenizer.json").write_text(json.dumps(tree))
        self._rehash(path, "tokenizer.json")
        self._use(path)

    def tensors(self) -> None:
        """Weights, held-out ids and resume points of other sizes, types and values, whose hashes fit."""
        path, chance = self._copy(), self.chance
        name = chance.choice(("model.safetensors", "heldout.safetensors", "last/resume.safetensors"))
        tensors, metadata = folder.read_tensors(path / name)
        for _ in range(chance.choice((1, 2, 5))):
            key = chance.choice(list(tensors)) if tensors else "x"
            tensor = tensors.pop(key, torch.zeros(1))
            change: Callable[[], torch.Tensor | None] = chance.choice(
                (
                    lambda tensor=tensor: tensor.flatten(),
                    lambda tensor=tensor: tensor[:0] if tensor.dim() else tensor,
                    lambda tensor=tensor: tensor.double(),
                    lambda tensor=tensor: tensor.to(torch.uint8),
                    lambda tensor=tensor: torch.full_like(tensor.float(), float("nan")),
                    lambda tensor=tensor: torch.full_like(tensor, 99),
                    lambda tensor=tensor: tensor.repeat(2, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor,
                    lambda: None,
                )
            )
            if (changed := change()) is not None:
                tensors[chance.choice((key, key, key, "x"))] = changed
        if "position" in metadata and chance.random() < 0.5:
            metadata["position"] = json.dumps(self.tree_changed(json.loads(metadata["position"])))
        with contextlib.suppress(TypeError):
            folder.write_tensors(path / name, tensors, metadata)
        self._rehash(path, name)
        self._use(path)

    def recipe(self) -> None:
        """A recipe file."""
        file = self.into / "recipe.toml"
        file.write_bytes(self._recipe(self.into / "run" / "recipe.toml"))
        load_recipe(file).to_toml()

    def tokenizer(self) -> None:
        """A tokenizer file, used."""
        file = self.into / "tokenizer.json"
        source = (self.into / self.chance.choice(("run", "bpe")) / "tokenizer.json").read_bytes()
        if self.chance.random() < 0.7:
            source = json.dumps(self.tree_changed(json.loads(source))).encode()
        else:
            source = self.bytes_changed(source)
        file.write_bytes(source)
        tokenizer = Tokenizer.load(file)
        tokenizer.decode(tokenizer.encode("the dog walks\n\u00e9 x"))

    def text(self) -> None:
        """Texts of any bytes, in any unit."""
        file = self.into / "text.txt"
        sources = (
            b"the dog walks\n" * 40,
            bytes(range(256)) * 4,
            "\u00e9\u4e2d\U0001f600 a\u200bb\r\n".encode() * 30,
            b"",
        )
        file.write_bytes(self.bytes_changed(self.chance.choice(sources)))
        unit: Any = self.chance.choice(("word", "character", "byte", "bpe"))
        corpus = open_corpus(str(file), None if unit == "byte" else self.chance.choice(("utf-8", "latin-1", "utf-16")))
        prepare(corpus, Vocabulary(unit, self.chance.choice((0, 1, 300)) if unit != "bpe" else 300))

    def archive(self) -> None:
        """Archives, with members of any name and kind, their bytes changed."""
        chance, names = (
            self.chance,
            ("a.train.txt", "b.valid.txt", "c.test.txt", "../../x.train.txt", "/etc/x", "a" * 300),
        )
        content, kind = io.BytesIO(), chance.choice(("tgz", "zip", "tar"))
        members = [chance.choice(names) for _ in range(chance.randrange(6))] + [*names[:3]] * (chance.random() < 0.7)
        if kind == "zip":
            with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
                for name in dict.fromkeys(members):
                    archive.writestr(name, b"the dog\n" * chance.choice((0, 3, 50_000)))
        else:
            with tarfile.open(fileobj=content, mode="w:gz" if kind == "tgz" else "w") as archive:
                for name in members:
                    member = tarfile.TarInfo(name)
                    member.type = chance.choice(MEMBERS)
                    member.linkname, member.size = "/etc/passwd", 80 if member.type == tarfile.REGTYPE else 0
                    archive.addfile(member, io.BytesIO(b"the dog\n" * 10))
        file = self.into / f"corpus.{kind}"
        file.write_bytes(content.getvalue() if chance.random() < 0.3 else self.bytes_changed(content.getvalue()))
        prepare(open_corpus(str(file)), Vocabulary("word"))

    # -------------------------------------------------------------------------------------------- helpers

    def _recipe(self, file: Path) -> bytes:
        if self.chance.random() < 0.5:
            return self.bytes_changed(file.read_bytes())
        lines = file.read_text().splitlines()
        at = self.chance.randrange(len(lines))
        value = self.chance.choice(ODD_VALUES)
        lines[at] = lines[at].split("=")[0] + "= " + value if "=" in lines[at] else "[model.x]"
        return "\n".join(lines).encode()

    def _copy(self) -> Path:
        path = self.into / "copy"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.into / "run", path)
        return path

    def _rehash(self, path: Path, name: str) -> None:
        manifest = folder.read_manifest(path)
        if name in manifest["files"]:
            manifest["files"][name] = sha256_of(path / name)
            folder.write_manifest(path, manifest)

    def _use(self, path: Path) -> None:
        """Everything that reads a run folder, each of it alone."""
        for use in (_score, _evaluate, _resume, _report, repair, _score):
            with contextlib.suppress(UnrolledError, OSError):
                use(path)


def _score(path: Path) -> None:
    run = unrolled.load(path)
    run.score("the dog walks")
    run.predict("the", 3)
    run.generate("the", length=3, seed=1)


def _evaluate(path: Path) -> None:
    unrolled.load(path).evaluate()


def _resume(path: Path) -> None:
    def progress(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            raise UnrolledError("far enough")

    unrolled.train(None, out=path, resume=True, changes={"training.max_epochs": 3}, progress=progress)


def _report(path: Path) -> None:
    write_report([unrolled.load(path)], path / "report.html", 0)


TARGETS = [
    *("run_bytes", "manifest", "recipe_of_run", "tokenizer_of_run", "tensors"),
    *("recipe", "tokenizer", "text", "archive"),
]


def prepare_folder(into: Path) -> None:
    """What is changed: a run of words, and a tokenizer of pieces."""
    small = {"model.embedding_size": 6, "model.hidden_sizes": "8", "training.batch_size": 200, "training.max_epochs": 1}
    unrolled.train("demo", data="toy", out=into / "run", changes=small)
    unrolled.train("demo", data="toy", out=into / "bpe", changes=small | {"data.tokens": "bpe", "data.vocab_size": 300})


def run_cases(into: Path, target: str, seed: int, count: int, seconds: float = math.inf) -> tuple[int, list[str]]:
    """Cases of a target in this process, so many or for so long; how many, and what went wrong, with its last lines."""
    failures, case, begun = list[str](), 0, time.monotonic()
    signal.signal(signal.SIGALRM, _too_long)
    for case in range(count):
        fuzz = Fuzz(into, seed * 1_000_003 + case)
        signal.alarm(SECONDS_A_CASE)
        try:
            getattr(fuzz, target)()
        except (UnrolledError, OSError):
            pass
        except BaseException as error:
            where = "".join(traceback.format_exception(error)[-3:])
            failures.append(f"{target}, seed {seed}, case {case}: {error!r}\n{where}")
        finally:
            signal.alarm(0)
        if time.monotonic() - begun > seconds:
            break
    return case + 1, failures


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"over {SECONDS_A_CASE} s")


def _child(source: Path, target: str, seed: int, count: int, connection: Any) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory() as own, contextlib.redirect_stderr(io.StringIO()):
        shutil.copytree(source, own, dirs_exist_ok=True)
        connection.send(run_cases(Path(own), target, seed, count, SECONDS_A_CHILD))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("targets", nargs="*", default=TARGETS)
    arguments = parser.parse_args()
    context, counts, kinds = multiprocessing.get_context("spawn"), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as into:
        kernels, cache = cache_folder() / "kernels", Path(into) / "cache"
        cache.mkdir()
        (cache / "kernels").symlink_to(kernels)
        os.environ["UNROLLED_CACHE"] = str(cache)
        prepare_folder(Path(into))
        number = 0
        while counts.total() < arguments.cases:
            target = arguments.targets[number % len(arguments.targets)]
            number += 1
            mine, other = context.Pipe()
            what = (Path(into), target, arguments.seed + number, CASES_A_CHILD, other)
            child = context.Process(target=_child, args=what)
            child.start()
            other.close()
            try:
                cases, failures = mine.recv()
            except EOFError:
                child.join()
                cases, failures = (
                    0,
                    [f"{target}, seed {arguments.seed + number}: the process ended with {child.exitcode}"],
                )
            child.join()
            counts[target] += cases
            for failure in failures:
                kind = failure.split(": ", 1)[1].split("\n")[0][:80]
                kinds[kind] += 1
                if kinds[kind] == 1:
                    print(failure, flush=True)
    print(", ".join(f"{target} {count:,}" for target, count in counts.items()))
    print(f"{counts.total():,} cases, {kinds.total():,} went wrong")
    sys.exit(bool(kinds))


if __name__ == "__main__":
    main()
