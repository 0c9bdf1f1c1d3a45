"""Steps timed in pairs, so that a busy machine slows both and decides nothing."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
CONDITIONS = ("idle", "busy")  # as the machine is; with another process on each core


def in_turns(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[dict]]:
    """Wall seconds and processor seconds of all threads, of each step in each round.

    Every other round runs in reverse order.
    """
    times: dict[str, list[dict]] = {name: [] for name in steps}
    for i in range(rounds):
        for name in list(steps)[:: 1 if i % 2 else -1]:
            wall, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            times[name].append(
                {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
            )
    return times


def spread(values: list[float]) -> list[float]:
    """Median, first and third quartile."""
    quartiles = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return [round(quartiles[i], 4) for i in (1, 0, 2)]


def shown(spread: list[float]) -> str:
    median, low, high = spread
    return f"{median:.2f} x ({low:.2f} to {high:.2f})"


@contextmanager
def cores(condition: str) -> Iterator[None]:
    """Within it the machine is as it is ("idle"), or another process runs on each core ("busy")."""
    number = (os.cpu_count() or 1) if condition == "busy" else 0
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()
