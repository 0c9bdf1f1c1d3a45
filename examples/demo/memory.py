"""Measured peak memory of the loss head: naive PyTorch against linear_rpo_loss on one batch."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from demo import models
from demo.data import Batch

from rpo_kernels import RPOObjective, linear_rpo_loss, preference_loss


def loss_head_peaks(
    policy, batch: Batch, objective: RPOObjective, temperature: float
) -> tuple[int, int]:
    """Return peak bytes above the inputs of (naive, ours), forward and backward.

    Gradients are those of hidden states and lm_head.
    """
    head = policy.get_output_embeddings()
    with torch.no_grad(), models.precision(policy.device):
        hidden = policy.base_model(
            batch.input_ids, batch.attention_mask, use_cache=False
        ).last_hidden_state
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, head.weight))
    scored = batch.labels != -100
    common = {
        "rewards": batch.rewards if objective.uses_rewards else None,
        "objective": objective,
        "ref_logps": None
        if objective.reference == "none"
        else torch.zeros(len(scored), device=scored.device),
        "cu_groups": batch.cu_groups,
    }

    def naive() -> None:
        logits = F.linear(hidden, weight, head.bias).float() / temperature
        logps = logits.log_softmax(-1).gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
        sums = torch.where(scored, logps, 0).sum(1)
        preference_loss(sums, lengths=scored.sum(1), **common).loss.backward()

    def ours() -> None:
        linear_rpo_loss(
            hidden, weight, batch.labels, bias=head.bias, temperature=temperature, **common
        ).loss.backward()

    return tuple(_peak(step, hidden, weight) for step in (naive, ours))


def _peak(step: Callable[[], None], *leaves: torch.Tensor) -> int:
    for _ in ("load code", "measure"):
        for leaf in leaves:
            leaf.grad = None
        with models.precision(leaves[0].device):
            peak = _watch_gpu(step) if leaves[0].is_cuda else _watch_process(step)
    for leaf in leaves:
        leaf.grad = None
    return peak


def _watch_gpu(step: Callable[[], None]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def _watch_process(step: Callable[[], None]) -> int:
    """Measure the resident set, if the system reports it; else return 0."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    resident = lambda: int(statm.read_text().split()[1]) * 4096
    # memory that was freed before must not be reused unnoticed
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        step()
    finally:
        done.set()
        watcher.join()
    return peak - before
