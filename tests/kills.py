"""A training that is killed again and again ends where the unbroken one ends. Run by a test; for the record by hand:

python tests/kills.py [--kills 200] [--seed 1] [RECIPE OPTION…]        (demo when left out)
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from unrolled.folder import read_tensors
from unrolled.metrics import read_metrics

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def kill_loop(into: Path, options: list[str], kills: int, seed: int) -> Counter[str]:
    """SIGKILL at random moments, so many times; then the training is left to come to its end.

    A round begins anew, or goes on from the resume point; one that ends before enough kills begins another training.
    The moments are parts of the time that the unbroken one took: on a machine that has become slower since, they may
    all lie before the first step, so that nothing here may wait for a training to end between two kills.

    Args:
        into: a folder for the runs.
        options: of `unrolled train`.
        kills: how many.
        seed: of the moments.

    Returns:
        How many kills there were; how many of them before there was a resume point and within the writing of a file;
        how many trainings came to their end, and how many of these ended elsewhere than the unbroken one: lost.
    """
    command = [sys.executable, "-m", "unrolled", "train", *options, "--quiet"]
    unbroken, killed, chance, counts = into / "unbroken", into / "killed", random.Random(seed), Counter[str]()
    begun = time.monotonic()
    subprocess.run([*command, "--out", unbroken], check=True, capture_output=True, env=ENVIRONMENT)
    longest = time.monotonic() - begun
    number, going_on = 0, False
    while True:
        path, enough, begun = killed / str(number), counts["kills"] >= kills, time.monotonic()
        process = subprocess.Popen(
            [*command[:4], "--resume", "--quiet", "--out", path] if going_on else [*command, "--out", path],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, err = process.communicate(timeout=None if enough else chance.uniform(0.2, 0.8) * longest)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            counts["kills"] += 1
            counts["within a write"] += any(path.rglob(".*.tmp"))
            going_on = any((path / "last" / f"{name}.safetensors").exists() for name in ("resume", "previous"))
            counts["before the first resume point"] += not going_on
            continue
        if process.returncode:
            raise RuntimeError(err)
        counts["ended"] += 1
        counts["lost"] += not is_same(unbroken, path)
        if enough:
            return counts
        if not going_on:
            longest = min(longest, time.monotonic() - begun)
        number, going_on = number + 1, False


def is_same(one: Path, other: Path) -> bool:
    """Whether two runs have the same weights and resume point, bit for bit, the same records, and nothing left over."""
    for name in ("model.safetensors", "last/resume.safetensors"):
        (mine, _), (theirs, _) = read_tensors(one / name), read_tensors(other / name)
        if mine.keys() != theirs.keys() or not all(torch.equal(mine[key], theirs[key]) for key in mine):
            return False
    clocks = {"elapsed_s", "tokens_per_second"}
    first, second = ([{k: v for k, v in r.items() if k not in clocks} for r in read_metrics(p)] for p in (one, other))
    return first == second and not any(other.rglob(".*.tmp"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("options", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    options = arguments.options or ["demo"]
    with tempfile.TemporaryDirectory() as into:
        counts = kill_loop(Path(into), options, arguments.kills, arguments.seed)
    print(" ".join(options), *(f"{name}: {count}" for name, count in counts.items()), sep="; ")


if __name__ == "__main__":
    main()
