"""Threads that each run PyTorch's operators alone.

PyTorch shares every operator among its threads, which wait for each other at its end, spinning.
Where other processes want the cores too, many short operators then cost several times their work.
A thread that takes whole operators never waits.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch


def run_on_threads(number: int, function: Callable[..., None], *arguments: object) -> None:
    """``function(*arguments)`` on that many threads at once; returns when all of them are done."""
    tasks = [_pool().submit(function, *arguments) for _ in range(number)]
    wait(tasks)
    for task in tasks:
        task.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "rpo_kernels", initializer=_run_alone)


if hasattr(os, "register_at_fork"):  # a fork has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _run_alone() -> None:
    """Operators of this thread run on it alone.

    The number of threads is each thread's own, but what one sets is where later ones begin: these
    get back what was there, from a thread that ends at once.
    """
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    other = threading.Thread(target=torch.set_num_threads, args=(number,))
    other.start()
    other.join()
