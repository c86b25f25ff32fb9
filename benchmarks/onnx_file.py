"""A model as an ONNX file: size, perplexity and speed in ONNX Runtime, in f32, in 8 bits, and after its own rounding.

The first 5,000 tokens of valid in windows of 100, then 200 next words of one stream, three times in turn, one thread.

    python benchmarks/onnx_file.py RUN
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.quantization import quantize_dynamic

import unrolled
from unrolled.export import OnnxReader
from unrolled.folder import read_tensors

TOKENS, WINDOW, WORDS, ROUNDS = 5_000, 100, 200, 3


def reader_of(path: Path) -> OnnxReader:
    reader, options = OnnxReader(path.read_bytes()), onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    reader.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return reader


def measure(path: Path, ids: np.ndarray) -> tuple[float, float, float]:
    """Perplexity, tokens/s in windows, microseconds for the next word."""
    reader, nats, begun = reader_of(path), 0.0, time.perf_counter()
    for first in range(0, TOKENS, WINDOW):
        targets = ids[first + 1 : first + 1 + WINDOW]
        log_probs = reader.read(ids[first : first + WINDOW, None])
        nats -= log_probs[np.arange(WINDOW), 0, targets].sum(dtype=np.float64)
    between = time.perf_counter()
    for id in ids[:WORDS]:
        reader.read(np.array([[id]]))
    ended = time.perf_counter()
    return float(np.exp(nats / TOKENS)), TOKENS / (between - begun), (ended - between) / WORDS * 1e6


def main() -> None:
    run = unrolled.load(sys.argv[1])
    ids = read_tensors(run.folder / "heldout.safetensors")[0]["valid"].numpy()[: TOKENS + 1].astype(np.int64)
    with tempfile.TemporaryDirectory() as folder:
        names = ("f32", "--int8", "quantize_dynamic")
        files = {name: Path(folder) / f"{name.strip('-')}.onnx" for name in names}
        run.export(files["f32"])
        run.export(files["--int8"], int8=True)
        quantize_dynamic(files["f32"], files["quantize_dynamic"])
        found = {name: [] for name in names}
        for _ in range(ROUNDS):
            for name in names:
                found[name].append(measure(files[name], ids))
        for name, results in found.items():
            size, speed = files[name].stat().st_size / 2**20, statistics.median(result[1] for result in results)
            words = ", ".join(f"{result[2]:.0f}" for result in results)
            print(
                f"{name}: {size:.1f} MiB, perplexity {results[0][0]:.3f}, {speed:,.0f} tokens/s, next word {words} µs"
            )


if __name__ == "__main__":
    main()
