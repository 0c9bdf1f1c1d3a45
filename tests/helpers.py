"""Helpers that several tests share."""

import contextlib
import itertools
import os
import shutil
from unittest import mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rpo_kernels.ops.operator import Operator
from rpo_kernels.tools.cases import poisoned_memory, worst

__all__ = ["poisoned_memory", "worst"]  # from `python -m rpo_kernels verify`

HAS_GPU = torch.cuda.is_available()
# for `benchmarks/host.py`, which compiles a libcuda if there is no GPU
needs_a_driver = pytest.mark.skipif(
    not HAS_GPU and shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler"
)


def compiling(**more: str) -> dict[str, str]:
    """Return the environment of a process in which kernels are compiled, not interpreted."""
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | more


def kernel_dtypes(backend: str) -> list[torch.dtype]:
    """Return the dtypes whose outputs a backend rounds.

    Triton's interpreter truncates to bf16, so that is tested on a GPU.
    """
    interpreted = backend == "triton" and not HAS_GPU
    return [torch.float32, torch.float16] + ([] if interpreted else [torch.bfloat16])


def peak_memory(step) -> int:
    """Largest number of bytes that PyTorch's allocator holds during a step, above what it held
    before. On a CPU with one thread: the profiler sees no memory of others.
    """
    if HAS_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    finally:
        torch.set_num_threads(threads)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(
        itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())),
        default=0,
    )


@contextlib.contextmanager
def operator_calls():
    """Context that sends calls through torch.library, and lists (operator, arguments) in order."""
    seen, inner = [], Operator._traced

    def recording(self, *args):
        kept = [
            x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
            for x in args
        ]
        seen.append((self, kept))
        return inner(self, *args)

    with (
        mock.patch.object(Operator, "_traced", recording),
        mock.patch.object(Operator, "on", lambda self, x: self._traced),
    ):
        yield seen
