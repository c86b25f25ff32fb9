"""What is damaged in a run folder, and what can be done about it: copies, the resume point before, weights from one."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from unrolled import folder
from unrolled.errors import UnrolledError
from unrolled.files import sha256_of, write_whole
from unrolled.metrics import damaged_metrics, epochs_of, read_metrics, rewrite_metrics
from unrolled.training.resume import STAND_IN, resume_files

_LOST = {
    "heldout.safetensors": "evaluate needs the text: --data",
    "recipe.toml": "nothing else tells what the network is",
    "tokenizer.json": "nothing else tells what the ids are",
}


@dataclass(frozen=True)
class Finding:
    """What is so of one file, and what was done."""

    file: str
    state: Literal["whole", "repaired", "lost"]
    remark: str = ""


def repair(path: Path) -> list[Finding]:
    """Checks every file of a run folder and mends what can be mended. What is damaged is kept as NAME.damaged.

    Args:
        path: the run folder.

    Raises:
        UnrolledError: it is none, a training is running in it, or neither its manifest nor the copy of it is whole.
    """
    if not path.is_dir():
        raise UnrolledError(f"no run folder {str(path)!r}")
    with folder.locked(path):
        manifest, findings = _manifest(path)
        findings += [_small(path, name, manifest) for name in (*folder.ALWAYS_CHECKED, "heldout.safetensors")]
        findings += _resume_points(path, manifest)
        findings += [_weights(path, manifest), _metrics(path, manifest)]
    return findings


def as_dict(finding: Finding) -> dict[str, Any]:
    """As `repair --json` says it."""
    return asdict(finding)


def _manifest(path: Path) -> tuple[dict[str, Any], list[Finding]]:
    file, copy = path / "manifest.json", path / "last" / "copies" / "manifest.json"
    try:
        return folder.read_manifest_file(file), [Finding(file.name, "whole")]
    except (UnrolledError, OSError) as error:
        try:
            manifest = folder.read_manifest_file(copy)
        except (UnrolledError, OSError):
            raise UnrolledError(f"{path} cannot be repaired: neither {file.name} nor its copy is whole") from error
    _set_aside(file)
    write_whole(file, copy.read_bytes())
    return manifest, [Finding(file.name, "repaired", "from its copy")]


def _small(path: Path, name: str, manifest: dict[str, Any]) -> Finding:
    file, copy, expected = path / name, path / "last" / "copies" / name, manifest["files"].get(name)
    if file.is_file() and expected in (None, sha256_of(file)):
        return Finding(name, "whole")
    if not copy.is_file() or sha256_of(copy) != expected:
        return Finding(name, "lost", _LOST[name])
    _set_aside(file)
    write_whole(file, copy.read_bytes())
    return Finding(name, "repaired", "from its copy")


def _resume_points(path: Path, manifest: dict[str, Any]) -> list[Finding]:
    newest, before = resume_files(path)
    names = [str(file.relative_to(path)) for file in (newest, before)]
    whole = [_is_whole(file, manifest) for file in (newest, before)]
    if whole[0]:
        if whole[1] or not before.exists():
            return [Finding(names[0], "whole")] + [Finding(names[1], "whole")] * whole[1]
        _set_aside(before)
        return [Finding(names[0], "whole"), Finding(names[1], "repaired", "taken away; the newer one is whole")]
    _set_aside(newest)
    if not whole[1]:
        _set_aside(before)
        return [Finding(names[0], "lost", "there is no whole resume point; the best weights can still be used")]
    before.replace(newest)
    step = _position(newest)["step"]
    return [Finding(names[0], "repaired", f"the point before it, at step {step:,}; --resume goes on from there")]


def _weights(path: Path, manifest: dict[str, Any]) -> Finding:
    file, (point, _) = path / "model.safetensors", resume_files(path)
    if _is_whole(file, manifest):
        return Finding(file.name, "whole")
    if not point.is_file():
        return Finding(file.name, "lost", "there is no resume point to take weights from")
    _set_aside(file)
    tensors, _ = folder.read_tensors(point)
    weights = {name.removeprefix("model."): part for name, part in tensors.items() if name.startswith("model.")}
    position, id, best_step = _position(point), manifest.get("id"), manifest.get("results", {}).get("best_step")
    step, between_epochs = position["step"], position["window"] == 0
    metadata = {"epoch": str(position["epoch"] - between_epochs)} | ({"run": id} if id else {})
    if between_epochs and step == best_step:
        remark = f"those of step {step:,}, which had the best validation"
    else:
        remark, metadata = f"those of step {step:,}, not of the best validation", metadata | {STAND_IN: "yes"}
        if manifest.pop("results", None):  # before the weights that they are not of, lest a kill leaves both
            folder.write_manifest(path, manifest)
            remark += "; its results are taken away"
    folder.write_tensors(file, weights, metadata)
    return Finding(file.name, "repaired", remark)


def _metrics(path: Path, manifest: dict[str, Any]) -> Finding:
    lines, file = damaged_metrics(path), path / "metrics.jsonl"
    if manifest.get("epochs") and not epochs_of(read_metrics(path)):
        return Finding(file.name, "lost", "no epoch is left in it; the weights can still be used")
    if not lines:
        return Finding(file.name, "whole")
    write_whole(file.with_name("metrics.jsonl.damaged"), file.read_bytes())
    rewrite_metrics(path, read_metrics(path))
    return Finding(file.name, "repaired", f"without its damaged lines {', '.join(map(str, lines[:10]))}")


def _is_whole(file: Path, manifest: dict[str, Any]) -> bool:
    try:
        folder.read_tensors(file, manifest.get("id"))
    except UnrolledError:
        return False
    return True


def _position(point: Path) -> dict[str, Any]:
    _, metadata = folder.read_tensors(point)
    return json.loads(metadata["position"])


def _set_aside(file: Path) -> None:
    if file.exists():
        file.replace(file.with_name(file.name + ".damaged"))
