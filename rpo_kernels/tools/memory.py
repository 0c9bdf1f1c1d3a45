"""How much memory a step asks for."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """Largest number of bytes that a step holds of PyTorch's allocator at a time, above what was
    held before.

    On a GPU as many as were asked for: the allocator's blocks, and what it keeps for later, are
    larger. A first step may also load code, and get cuBLAS its workspace from the allocator.
    """
    if device == "cuda":
        requested = lambda kind: torch.cuda.memory_stats()[f"requested_bytes.all.{kind}"]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = requested("current")
        step()
        return requested("peak") - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in events), initial=0))
