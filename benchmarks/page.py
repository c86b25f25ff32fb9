"""From key press to new suggestions on the page, in a real Chromium on the same machine.

python benchmarks/page.py RUN TEXT [--keys 500]              types the beginning of TEXT, 8 keys a second
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
TIMES = "performance.getEntriesByName('suggestions').map((entry) => entry.duration)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("text", type=Path)
    parser.add_argument("--keys", type=int, default=500)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "unrolled", "serve", arguments.run, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        assert server.stderr is not None
        address = server.stderr.readline().split(" at ")[1].strip()
        try:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=OPTIONS)
            page = browser.new_page()
            page.goto(address)
            page.wait_for_selector("#words button")
            text = arguments.text.read_text(encoding="utf-8")[: arguments.keys]
            page.locator("#text").press_sequentially(text, delay=125, timeout=1e6)
            page.wait_for_timeout(500)
            times = page.evaluate(TIMES)
            browser.close()
        finally:
            server.terminate()
    percentile = statistics.quantiles(times, n=100)
    figures = {f"p{p}_ms": round(percentile[p - 1], 1) for p in (50, 95, 99)}
    print(json.dumps({"keys": len(text), "answers": len(times)} | figures))


if __name__ == "__main__":
    main()
