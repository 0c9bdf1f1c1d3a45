"""A pool of threads that each run PyTorch's operators on a single core.

PyTorch splits every operator over its threads, which spin at its end until all are done. When other
processes use the cores too, many short operators then cost several times their work. A thread that
runs whole operators does not wait.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch


def run_on_threads(number: int, function: Callable[..., None], *arguments: object) -> None:
    """Run `function(*arguments)` on that many threads at once, and wait for all of them."""
    mode = torch.is_inference_mode_enabled()  # of this thread alone
    tasks = [_pool().submit(_in_mode, mode, function, *arguments) for _ in range(number)]
    wait(tasks)
    for task in tasks:
        task.result()


def _in_mode(mode: bool, function: Callable[..., None], *arguments: object) -> None:
    with torch.inference_mode(mode):
        function(*arguments)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "rpo_kernels", initializer=_run_alone)


if hasattr(os, "register_at_fork"):  # a fork has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _run_alone() -> None:
    """Make this thread run operators without others.

    The number of threads is a setting of each thread, but a new thread starts with the last value
    that any thread set. So a second, short-lived thread sets the previous value again.
    """
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    other = threading.Thread(target=torch.set_num_threads, args=(number,))
    other.start()
    other.join()
