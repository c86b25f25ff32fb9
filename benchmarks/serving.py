"""The server under load: next words asked by 1, 16 and 64 clients at once, and its memory over many requests.

python benchmarks/serving.py RUN TEXT [--seconds 60] [--clients 1 16 64] [--requests 100000]

Each client asks for the ten likeliest words after the beginning of a line of TEXT, of any length, and asks again when
it has the answer. Clients and server share the machine. Prints a line of JSON for each measurement.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: dict[str, object]) -> int:
    """One request on an open connection; the status. By hand, for a client should take little of the processor."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
    length = next(int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:"))
    await reader.readexactly(length)
    return int(lines[0].split()[1])


async def client(port: int, prefixes: list[str], seed: int, until: float, most: int) -> tuple[list[float], int]:
    """The seconds that each request took, and how many went wrong."""
    chance, times, errors = random.Random(seed), list[float](), 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while time.perf_counter() < until and len(times) < most:
        begun = time.perf_counter()
        errors += await ask(reader, writer, "/predict", {"prefixes": chance.choice(prefixes), "k": 10}) != 200
        times.append(time.perf_counter() - begun)
    writer.close()
    return times, errors


async def load(port: int, prefixes: list[str], clients: int, seconds: float, requests: int) -> dict[str, object]:
    """All clients for so long, or until there were so many requests."""
    begun = time.perf_counter()
    work = (client(port, prefixes, seed, begun + seconds, requests // clients) for seed in range(clients))
    results = await asyncio.gather(*work)
    elapsed, times = time.perf_counter() - begun, sorted(value for times, _ in results for value in times)
    percentile = statistics.quantiles(times, n=100)
    return {
        "clients": clients,
        "requests": len(times),
        "errors": sum(errors for _, errors in results),
        "requests_per_second": round(len(times) / elapsed, 1),
        **{f"p{p}_ms": round(1e3 * percentile[p - 1], 2) for p in (50, 95, 99)},
        "most_ms": round(1e3 * times[-1], 2),
    }


def memory_mib(process: int) -> float:
    """What the server has in memory now."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("text", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--requests", type=int, default=100_000)
    arguments = parser.parse_args()
    chance = random.Random(1)
    lines = [line.split() for line in arguments.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    prefixes = [" ".join(line[: chance.randrange(len(line) + 1)]) for line in lines]
    command = [sys.executable, "-m", "unrolled", "serve", arguments.run, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        port = int(server.stderr.readline().rsplit(":", 1)[1])
        try:
            asyncio.run(load(port, prefixes, 4, 3, 10**9))  # warm
            for clients in arguments.clients:
                print(json.dumps(asyncio.run(load(port, prefixes, clients, arguments.seconds, 10**9))), flush=True)
            parts = 10
            for part in range(parts):
                result = asyncio.run(load(port, prefixes, 16, 1e9, arguments.requests // parts))
                served, errors = (part + 1) * arguments.requests // parts, result["errors"]
                print(
                    json.dumps({"served": served, "errors": errors, "memory_mib": round(memory_mib(server.pid), 1)}),
                    flush=True,
                )
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
