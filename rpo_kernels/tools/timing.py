"""Seconds on the device's own clock, each step from a cold cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Tick:
    """A moment on a GPU's clock; ``b - a`` are seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Tick) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def clock(device: str) -> Callable[[], Any]:
    """What tells the time: moments of which ``b - a`` are seconds."""
    return Tick if device == "cuda" else time.perf_counter


def is_device_lost(error: Exception) -> bool:
    """Whether an error, in the words of PyTorch or of Triton, leaves the CUDA context unusable."""
    by_triton = "[CUDA]" in str(error) and any(
        word in str(error) for word in ("illegal", "launch failure", "misaligned")
    )
    return by_triton or "CUDA error" in str(error)


_cache: dict[torch.device, torch.Tensor] = {}


def flush_cache(device: torch.device) -> None:
    """Write more than the last cache holds.

    On a CPU nothing is done: large working sets do that themselves.
    """
    if device.type == "cuda":
        if device not in _cache:
            _cache[device] = torch.empty(256 << 20, dtype=torch.int8, device=device)
        _cache[device].zero_()
        # about a millisecond, in which the host gets ahead of the device
        torch.cuda._sleep(2_000_000)


def seconds(
    step: Callable[[], object], prepare: Callable[[], object], device: str, rounds: int
) -> list[float]:
    """Times of single steps, each prepared."""
    now, times = clock(device), []
    for _ in range(rounds):
        prepare()
        start = now()
        step()
        times.append(now() - start)
    return times
