"""Timing with the device's clock, each step with a cold cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Tick:
    """A point in time on a GPU's clock; `b - a` is in seconds."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Tick) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def clock(device: str) -> Callable[[], Any]:
    """Return a function that reads the device's clock; differences are in seconds."""
    return Tick if device == "cuda" else time.perf_counter


def is_device_lost(error: Exception) -> bool:
    """Return whether an error of PyTorch or Triton leaves the CUDA context unusable."""
    by_triton = "[CUDA]" in str(error) and any(
        word in str(error) for word in ("illegal", "launch failure", "misaligned")
    )
    return by_triton or "CUDA error" in str(error)


_cache: dict[torch.device, torch.Tensor] = {}


def flush_cache(device: torch.device) -> None:
    """Overwrite the last-level cache of a GPU.

    Nothing is done on a CPU, where large working sets do it themselves.
    """
    if device.type == "cuda":
        if device not in _cache:
            _cache[device] = torch.empty(256 << 20, dtype=torch.int8, device=device)
        _cache[device].zero_()
        # about a millisecond, in which the CPU gets ahead of the GPU
        torch.cuda._sleep(2_000_000)


def seconds(
    step: Callable[[], object], prepare: Callable[[], object], device: str, rounds: int
) -> list[float]:
    """Time single steps, each after `prepare`."""
    now, times = clock(device), []
    for _ in range(rounds):
        prepare()
        start = now()
        step()
        times.append(now() - start)
    return times
