"""The record of a training: a line of JSON for every logged step and every epoch, each with its own check sum."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

from unrolled.files import write_whole


def append_metrics(path: Path, record: dict[str, Any]) -> None:
    """One more line of a run folder's `metrics.jsonl`."""
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(_line(record))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run folder, or of its `metrics.jsonl` alone; damaged lines are left out."""
    return [record for record in _records(path) if record is not None]


def epochs_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those at the end of an epoch; the others are of a step."""
    return [record for record in records if "nll_nats_per_token" not in record]


def damaged_metrics(path: Path) -> list[int]:
    """The numbers of the lines, from 1, that are not as they were written."""
    return [number for number, record in enumerate(_records(path), start=1) if record is None]


def cut_metrics(path: Path, step: int, epoch: int) -> None:
    """Takes away what was recorded after `step` of `epoch`, before going on from there."""
    kept = [
        record
        for record in read_metrics(path)
        if record["step"] <= step and ("nll_nats_per_token" in record or record["epoch"] < epoch)  # a step, or an epoch
    ]
    rewrite_metrics(path, kept)


def rewrite_metrics(path: Path, records: list[dict[str, Any]]) -> None:
    """A run folder's `metrics.jsonl` of these records alone."""
    write_whole(path / "metrics.jsonl", "".join(map(_line, records)).encode())


def finite(value: Any) -> Any:
    """The same with None for what JSON has no number for: infinity, NaN."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: dict[str, Any]) -> str:
    record = finite(record)
    return json.dumps(record | {"sum": _sum(record)}) + "\n"


def _sum(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _records(path: Path) -> list[dict[str, Any] | None]:
    """A record for each line, None for a damaged one. Lines from before there were sums have none, all of them."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    lines = file.read_bytes().split(b"\n") if file.is_file() else [b""]
    found = [_read(line) for line in lines[: len(lines) - (lines[-1] == b"")]]
    summed = any(record is not None and "sum" in record for record in found)
    records: list[dict[str, Any] | None] = []
    for record in found:
        sum = record.pop("sum", None) if record is not None else None
        whole = record is not None and _is_record(record) and (not summed or sum == _sum(record))
        records.append(record if whole else None)
    return records


def _read(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _is_record(record: dict[str, Any]) -> bool:
    if not all(isinstance(record.get(name), int) and record[name] > 0 for name in ("step", "epoch")):
        return False
    figures = (value for name, value in record.items() if name not in ("sample", "valid_protocol"))
    texts = (record.get(name, "") for name in ("sample", "valid_protocol"))
    return all(isinstance(value, int | float | None) for value in figures) and all(isinstance(t, str) for t in texts)
