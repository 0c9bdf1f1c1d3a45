"""Benchmark the loss head of every provider: check it against float64, then time it.

    make bench                      # full sizes on a GPU, small ones on a CPU
    python -m pytest benchmarks/bench.py -k "Qwen3 and 8192 and pair" --results FILE --budget 300

A wrong provider is reported with its error and not timed. Results are saved after each measurement;
tables and plots are written at the end (benchmarks/results.py).
"""

from __future__ import annotations

import math
import time

import pytest
import torch
from measure import Step, check, peak_of, quartiles
from providers import Ours

from rpo_kernels.tools.timing import clock, is_device_lost, seconds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS, ROUNDS = (1.0, (5, 30)) if DEVICE == "cuda" else (0.1, (3, 10))


@pytest.mark.benchmark(timer=clock(DEVICE))
def test_head(case, provider, bench, timer):
    if bench.results.has(case, provider):
        pytest.skip("in the results file already")
    if time.monotonic() > bench.ends:
        pytest.skip("the time budget is spent")
    if reason := provider.missing(case, bench.device):
        bench.results.add(case, provider, "skipped", reason=reason)
        pytest.skip(f"{provider.name} {reason}")
    lost = False
    try:
        measure(case, provider, bench, timer)
    except torch.OutOfMemoryError:
        bench.results.add(case, provider, "out of memory")
        pytest.xfail("out of memory")
    except Exception as error:
        words = (str(error).splitlines() or [""])[0][:200]
        bench.results.add(case, provider, "failed", reason=f"{type(error).__name__}: {words}")
        if is_device_lost(error):
            lost = True
            pytest.exit(
                f"{provider.name} left the device unusable; start again, and the run goes on "
                "behind it",
                returncode=1,
            )
        if isinstance(provider, Ours):
            raise
        pytest.xfail(f"{provider.name}: {error}")
    finally:
        if not lost:
            bench.free()


def measure(case, provider, bench, timer) -> None:
    bench.load(case)
    limit, why = bench.ceilings.limit(case)
    step = Step(case, provider, bench.inputs)
    errors = check(step, bench.truth)
    facts = {"error": errors.absolute, "gradient_errors": errors.relative}
    if errors.verdict:
        bench.results.add(case, provider, "wrong", reason=errors.verdict, **facts)
        (pytest.fail if isinstance(provider, Ours) else pytest.xfail)(
            f"{provider.name}: {errors.verdict}"
        )
    warm = seconds(step, step.prepare, bench.device, 2)[-1]
    rounds = max(ROUNDS[0], min(ROUNDS[1], math.ceil(SECONDS / warm)))
    if timer is None:
        times = seconds(step, step.prepare, bench.device, rounds)
    else:
        timer.group = case.id
        timer.pedantic(step, setup=step.prepare, rounds=rounds)
        times = timer.stats.stats.data
    first, median, third = quartiles(times)
    bench.results.add(
        case,
        provider,
        "ok",
        median_s=median,
        quartiles_s=[first, third],
        rounds=rounds,
        peak_bytes=peak_of(step, bench.device),
        limit_s=limit,
        limit=why,
        **facts,
    )
