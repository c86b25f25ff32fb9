"""How the processor's threads wait, which PyTorch decides once, when it is imported."""

import os
import time
from pathlib import Path


def share_the_processor() -> None:
    """Lets threads sleep while they wait, where another program is at work; to be called before torch is imported.

    Threads that spin while they wait are faster by a half alone, and slower by ten times and more as soon as another
    program wants their core (docs/LOG.md). The figures come out the same either way.
    """
    if others_run():
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def others_run() -> bool:
    """Whether another program is at work just now; not known but on Linux."""
    try:
        running = []
        for _ in range(3):
            running.append(int(Path("/proc/loadavg").read_text(encoding="utf-8").split()[3].partition("/")[0]))
            time.sleep(0.02)
    except (OSError, ValueError, IndexError):  # not Linux
        return False
    return min(running) > 1  # ourselves
