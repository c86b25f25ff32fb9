"""What a training holds in memory over a large text, beside the same recipe over a small one.

python benchmarks/memory.py [--megabytes 10 1000] [--seconds 90] [RECIPE OPTION…]           (ptb-small when left out)

The texts are drawn from 50,000 words with Zipf's frequencies. Reading, learning the vocabulary, counting and training
all count; the training is stopped after so many seconds of it. Prints a line of JSON for each text: the most that was
resident, and the most of it that was not pages of files, which the system may take back.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WORDS, LINES_A_BLOCK, WORDS_A_LINE = 50_000, 50_000, 20


def write_text(path: Path, size: int) -> None:
    """A text of about so many bytes."""
    chance = np.random.default_rng(1)
    words = np.array([f"{number:x}".translate(str.maketrans("0123456789", "ghijklmnop")) for number in range(WORDS)])
    weights = np.cumsum(1 / np.arange(1, WORDS + 1))
    with path.open("w", encoding="ascii") as file:
        while file.tell() < size:
            drawn = chance.random((LINES_A_BLOCK, WORDS_A_LINE)) * weights[-1]
            file.writelines(" ".join(line) + "\n" for line in words[np.searchsorted(weights, drawn)])


def watched(text: Path, into: Path, options: list[str], seconds: float) -> dict[str, object]:
    """A training of so many seconds after its first line about an epoch."""
    recipe = options or ["ptb-small"]
    command = [sys.executable, "-m", "unrolled", "train", recipe[0], "--data", str(text), "--out", str(into / "run")]
    environment = os.environ | {"UNROLLED_CACHE": str(into / "cache")}
    most, begun, trains = [0.0, 0.0], time.monotonic(), 0.0
    with subprocess.Popen([*command, *recipe[1:]], env=environment, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            values = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
            now = [int(values.get(name, 0)) / 1024 for name in ("VmHWM", "RssAnon")]
            most = [max(pair) for pair in zip(most, now, strict=True)]
            if not trains and (into / "run" / "metrics.jsonl").exists():
                trains = time.monotonic()
            if trains and time.monotonic() - trains > seconds:
                process.send_signal(signal.SIGTERM)
                trains = float("inf")
            time.sleep(0.05)
    return {
        "text_mb": round(text.stat().st_size / 1e6),
        "resident_mib": round(most[0]),
        "anonymous_mib": round(most[1]),
        "seconds": round(time.monotonic() - begun),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("options", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder) / "text.txt"
            write_text(text, megabytes * 10**6)
            print(json.dumps(watched(text, Path(folder), arguments.options, arguments.seconds)), flush=True)


if __name__ == "__main__":
    main()
