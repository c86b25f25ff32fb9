"""How speed and memory grow: with hidden size, vocabulary, streams, threads and the corpus. JSON lines, one a case.

Everything but what grows is `ptb-small`. Ours (in bf16 where the processor multiplies it, else in f32) and PyTorch's
nn.LSTM (f32) train on the same ids, drawn as Zipf has them, in turns, each round in a process of its own, of which the
median speed, the rounds' ratios and the most memory are reported. The corpus is a text file of a million words, ten and
a hundred, trained on as `unrolled train` would, so its memory holds the reading too.

    python benchmarks/growth.py [--rounds 3] [--seconds 2] > docs/results/growth.jsonl
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from unrolled.bench import peak_memory_mib
from unrolled.data.dataset import prepare
from unrolled.data.text import open_corpus
from unrolled.data.tokens import Vocabulary
from unrolled.files import cache_folder
from unrolled.recipe import load_recipe
from unrolled.subjects import BASELINE, Case, fastest_precision, ours, plain

VOCAB_SIZE, THREADS, MILLION = 10_000, 2, 1_000_000
CASES: list[tuple[str, list[int]]] = [
    ("hidden_size", [100, 200, 400, 650, 1000, 1500]),
    ("vocab_size", [10_000, 50_000, 200_000]),
    ("batch_size", [1, 5, 20, 64, 256]),
    ("threads", [1, 2]),
    ("corpus_words", [MILLION, 10 * MILLION, 100 * MILLION]),
]
SUBJECTS = {
    f"unrolled {fastest_precision()}": lambda case: ours("train", case, fastest_precision()),
    BASELINE: lambda case: plain("train", case, "f32"),
}


def zipf(count: int, vocab_size: int) -> np.ndarray:
    """Ids (count,), the k-th commonest about 1 / k as often as the commonest; a million of them, again and again."""
    shares = 1 / np.arange(1, vocab_size + 1)
    ids = np.random.default_rng(1).choice(vocab_size, min(count, MILLION), p=shares / shares.sum())
    return np.resize(ids.astype(np.uint32), count)


def write_text(path: Path, words: int) -> None:
    """So many words in lines of twenty."""
    lines = zipf(MILLION, VOCAB_SIZE - 1).reshape(-1, 20)
    block = "".join(" ".join(f"w{id}" for id in line) + "\n" for line in lines.tolist())
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(words // MILLION):
            file.write(block)


def measure(subject: str, grows: str, size: int, text: str | None, seconds: float) -> tuple[float, float]:
    """Trains for some seconds; tokens per second, and the most memory of this process in MiB."""
    torch.set_num_threads(size if grows == "threads" else THREADS)
    recipe, vocab_size = load_recipe("ptb-small"), VOCAB_SIZE
    if grows == "hidden_size":
        recipe = recipe.changed({"model.hidden_sizes": f"{size},{size}", "model.embedding_size": size})
    if grows == "batch_size":
        recipe = recipe.changed({"training.batch_size": size})
    if grows == "vocab_size":
        vocab_size = size
    if text is not None:
        dataset = prepare(open_corpus(text), Vocabulary("word", VOCAB_SIZE))
        ids, vocab_size = dataset.ids["train"], len(dataset.tokenizer)
    else:
        ids = zipf(MILLION, vocab_size)
    work, count = SUBJECTS[subject](Case(recipe, ids, vocab_size, "")), 3
    work(count)
    begun = time.perf_counter()
    work(count)
    count = max(count, round(count * seconds / (time.perf_counter() - begun)))
    begun = time.perf_counter()
    work(count)
    tokens = count * recipe.training.batch_size * recipe.training.num_steps
    return tokens / (time.perf_counter() - begun), peak_memory_mib()


def summary(rounds: list[tuple[float, float]], baseline: list[tuple[float, float]]) -> dict[str, float]:
    """What the rounds of a subject come to: median speed and memory, and the rounds' ratios to the baseline's speed."""
    ratios = [speed / other for (speed, _), (other, _) in zip(rounds, baseline, strict=True)]
    return {
        "tokens_per_second": round(median(speed for speed, _ in rounds)),
        "ratio_to_baseline": round(median(ratios), 2),
        "ratio_minimum": round(min(ratios), 2),
        "ratio_maximum": round(max(ratios), 2),
        "peak_memory_mib": round(max(memory for _, memory in rounds)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        (Path(folder) / "kernels").symlink_to(cache_folder() / "kernels")
        os.environ["UNROLLED_CACHE"] = folder  # a gigabyte of ids is not for the user's
        for grows, sizes in CASES:
            for size in sizes:
                if grows == "corpus_words":
                    write_text(text, size)
                corpus = str(text) if grows == "corpus_words" else None
                rounds: dict[str, list[tuple[float, float]]] = {subject: [] for subject in SUBJECTS}
                for subject in [*SUBJECTS] * options.rounds:
                    with multiprocessing.get_context("spawn").Pool(1) as pool:
                        rounds[subject].append(pool.apply(measure, (subject, grows, size, corpus, options.seconds)))
                for subject, measured in rounds.items():
                    case = {"grows": grows, "size": size, "subject": subject}
                    print(json.dumps(case | summary(measured, rounds[BASELINE])), flush=True)


if __name__ == "__main__":
    main()
