"""Speed and memory of turning a corpus into ids, on one core: everything, a second start, the encoding alone.

Each case runs in a process of its own on one core, with an empty cache. The text is drawn from Zipf's law over 200,000
words, so that there is as much of it as is asked for and the vocabulary is as large as that of real text.

    python benchmarks/encode.py [--words 20]     (millions)
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from unrolled.data.tokens import Unit


def write_text(path: Path, words: int) -> int:
    """`words` words of made-up text in lines of 20; returns the number of characters."""
    source = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfw"))
    lengths = source.integers(2, 11, 200_000)
    vocabulary = np.array(["".join(letters[source.integers(0, 16, length)]) for length in lengths])
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for first in range(0, words, 1_000_000):
            ranks = np.minimum(source.zipf(1.2, min(1_000_000, words - first)), 200_000) - 1
            lines = vocabulary[ranks].reshape(-1, 20)
            size += file.write("".join(" ".join(line) + "\n" for line in lines.tolist()))
    return size


def measure(path: Path, unit: Unit) -> None:
    """In a process of its own: prepares the text, starts again, encodes it with the vocabulary known."""
    from unrolled.data.dataset import encode_split, prepare
    from unrolled.data.text import open_corpus
    from unrolled.data.tokens import Vocabulary

    seconds = []
    for _ in range(2):
        begun = time.perf_counter()
        dataset = prepare(open_corpus(str(path)), Vocabulary(unit))
        seconds.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    corpus = open_corpus(str(path))
    tokens = sum(len(ids) for split in corpus.splits for ids in encode_split(corpus, split, dataset.tokenizer))
    seconds.append(time.perf_counter() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(*seconds, tokens, len(dataset.tokenizer), peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=float, default=20)
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "UNIT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), options.measure[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        size = write_text(text, int(options.words * 1e6))
        print(f"{options.words:g} million words, {size / 1e6:.0f} million characters, one core")
        heads = (("tokens", 12), ("vocabulary", 10), ("seconds", 8), ("M tokens/s", 10), ("encode M/s", 10))
        heads += (("again s", 8), ("peak MiB", 8))
        print("unit      ", *(f"{head:>{width}}" for head, width in heads))
        for unit in ("word", "character", "byte", "bpe"):
            environment = os.environ | {
                "UNROLLED_CACHE": f"{folder}/cache-{unit}",
                "TOKENIZERS_PARALLELISM": "false",
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, __file__, "--measure", str(text), unit]
            cores = sorted(os.sched_getaffinity(0))[:1]
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                check=True,
                preexec_fn=lambda cores=cores: os.sched_setaffinity(0, cores),
            )
            first, again, encode, tokens, entries, peak = map(float, done.stdout.split())
            print(
                f"{unit:10} {tokens:12,.0f} {entries:10,.0f} {first:8.2f} {tokens / first / 1e6:10.2f} "
                f"{tokens / encode / 1e6:10.2f} {again:8.3f} {peak / 1024:8.0f}"
            )


if __name__ == "__main__":
    main()
