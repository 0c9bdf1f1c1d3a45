"""Memory that a step requests."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """Return the peak of the bytes that a step requests from PyTorch's allocator, above its start.

    On a GPU these are requested bytes: the allocator's blocks and its cache are larger. On a CPU
    the step runs on one thread, because the profiler does not see the memory of others. A first
    step may also load code and allocate cuBLAS's workspace.
    """
    if device == "cuda":
        requested = lambda kind: torch.cuda.memory_stats()[f"requested_bytes.all.{kind}"]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = requested("current")
        step()
        return requested("peak") - before
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    finally:
        torch.set_num_threads(threads)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in events), initial=0))
