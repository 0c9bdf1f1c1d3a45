"""Threads of the CPU row pass: they change no bit, no setting, and survive a fork."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from rpo_kernels import (
    RPOObjective,
    linear_rpo_loss,
    linear_token_logps,
    token_logps,
    token_logps_and_entropy,
)
from rpo_kernels.torch_backend import rows
from rpo_kernels.torch_backend.threads import run_on_threads


@pytest.fixture
def threads():
    """Sets PyTorch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def results(dtype=torch.float32):
    """Of chunks of a few rows, with gaps between scored ones."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4, 25, 1503, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, 1503, (4, 25), generator=generator)
    labels[1, 3:20:2] = -100
    logps, entropies = token_logps_and_entropy(logits, labels, backend="torch")
    (logps + 0.1 * entropies).sum().backward()
    return logps.detach(), entropies.detach(), logits.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logps_are_the_same_bits_on_any_number_of_threads(dtype, threads, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_BYTES", 8 * 4 * 1503)
    threads(1)
    alone = results(dtype)
    for number in (2, 3, 200):
        threads(number)
        for a, b in zip(alone, results(dtype)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("number", [1, 2])
def test_losses_of_a_reference_run_in_inference_mode(number, threads):
    """Which is a mode of each thread: what one allocates in it, no other may write to outside."""
    threads(number)
    hidden, weight, labels = torch.randn(4, 20, 8), torch.randn(33, 8), torch.randint(33, (4, 20))
    call = lambda: (
        token_logps(hidden @ weight.t(), labels),
        linear_token_logps(hidden, weight, labels),
        linear_rpo_loss(hidden, weight, labels, None, RPOObjective.simpo()).loss,
    )
    expected = call()
    with torch.inference_mode():
        assert all(map(torch.equal, call(), expected))


def test_token_logps_leave_the_number_of_threads_of_others_as_it_was(threads):
    threads(3)
    inside, later = [], []
    run_on_threads(3, lambda: inside.append(torch.get_num_threads()))
    other = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert (inside, later, torch.get_num_threads()) == ([1] * 3, [3], 3)


def test_token_logps_raise_what_a_thread_raised_once_all_are_done():
    done, first = [], threading.Lock()

    def work():
        if first.acquire(blocking=False):
            raise ValueError("the first one")
        time.sleep(0.05)
        done.append(True)

    with pytest.raises(ValueError, match="the first one"):
        run_on_threads(2, work)
    assert done


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_token_logps_run_in_a_fork_of_a_process_that_has_threads(threads):
    """The fork has none of them, and must not wait for them."""
    threads(2)
    logits, labels = torch.randn(2, 20, 1503), torch.randint(0, 1503, (2, 20))
    expected = token_logps(logits, labels)
    if (child := os.fork()) == 0:
        os._exit(0 if torch.equal(token_logps(logits, labels), expected) else 1)
    status = None
    for _ in range(300):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the fork hangs")
    assert status == 0
