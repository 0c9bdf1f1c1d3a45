"""What only a GPU can show: no call waits for the device, graphs replay to the same bits, any
device may be the current one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from rpo_kernels import RPOObjective, linear_rpo_loss, rpo_loss, token_logps_and_entropy

from ..helpers import HAS_GPU, peak_memory

pytestmark = pytest.mark.skipif(not HAS_GPU, reason="no GPU")
OBJECTIVE = RPOObjective(beta=0.5)
COUNTS = [6, 5, 6, 0]


def step_of(
    name: str, device: str = "cuda"
) -> tuple[list[torch.Tensor], Callable[[], list[torch.Tensor]]]:
    """Inputs that may be refilled, and a step from them to a loss and its gradients."""
    generator = torch.Generator(device).manual_seed(0)
    S, T, V, H = 4, 6, 4097, 64
    logits = torch.randn(
        S, T, V, generator=generator, device=device, dtype=torch.bfloat16
    ).requires_grad_()
    hidden = torch.randn(
        S, T, H, generator=generator, device=device, dtype=torch.bfloat16
    ).requires_grad_()
    weight = torch.randn(
        V, H, generator=generator, device=device, dtype=torch.bfloat16
    ).requires_grad_()
    labels = torch.randint(V, (S, T), generator=generator, device=device)
    labels[1, 2], labels[3] = -100, -100
    rewards, ref_logps = (torch.randn(S, generator=generator, device=device) for _ in range(2))

    def logits_step(inplace: bool) -> list[torch.Tensor]:
        out = rpo_loss(
            logits * 1, labels, rewards, OBJECTIVE, ref_logps=ref_logps, inplace_backward=inplace
        )
        return [out.loss.detach(), out.rewards, *torch.autograd.grad(out.loss, [logits])]

    def tokens_step() -> list[torch.Tensor]:
        logps, entropies = token_logps_and_entropy(logits, labels)
        return [
            logps.detach(),
            entropies.detach(),
            *torch.autograd.grad((logps * entropies).sum(), [logits]),
        ]

    def linear_step(workspace: int | None) -> list[torch.Tensor]:
        out = linear_rpo_loss(
            hidden,
            weight,
            labels,
            rewards,
            OBJECTIVE,
            ref_logps=ref_logps,
            counts=COUNTS,
            workspace_bytes=workspace,
        )
        return [
            out.loss.detach(),
            out.rewards,
            *torch.autograd.grad(out.loss * 2, [hidden, weight]),
        ]

    steps = {
        "logits": lambda: logits_step(False),
        "logits in place": lambda: logits_step(True),
        "tokens": tokens_step,
        "hidden states": lambda: linear_step(None),
        "hidden states in chunks": lambda: linear_step(12 * 6 * V),
    }
    return [logits, hidden, weight, rewards, ref_logps], steps[name]


STEPS = ["logits", "logits in place", "tokens", "hidden states", "hidden states in chunks"]


@contextmanager
def waiting_raises() -> Iterator[None]:
    try:
        with warnings.catch_warnings(action="ignore"):  # that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", STEPS)
def test_public_functions_never_wait_for_the_device(name):
    _, step = step_of(name)
    step()  # compiles, and asks once what this PyTorch can do
    with waiting_raises():
        step()
    with waiting_raises(), pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("name", STEPS)
def test_public_functions_in_a_captured_graph_replay_to_the_same_bits(name):
    inputs, step = step_of(name)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for x in inputs:
                x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


@pytest.mark.filterwarnings("ignore")  # inductor is made of pieces that torch deprecates
@pytest.mark.parametrize("counts", [None, COUNTS])
def test_a_loss_compiled_with_cuda_graphs_is_the_eager_one(counts):
    """Inductor's graphs leave out the operators, which may wait for the device."""
    (_, hidden, weight, rewards, ref_logps), _ = step_of("hidden states")
    labels = torch.randint(4097, (4, 6), device="cuda")
    labels[1, 2], labels[3] = -100, -100

    def loss(hidden, weight):
        options = {"ref_logps": ref_logps, "counts": counts}
        return linear_rpo_loss(hidden * 2, weight, labels, rewards, OBJECTIVE, **options).loss * 3

    def step(loss):
        value = loss(hidden, weight)
        return [value.detach().clone(), *torch.autograd.grad(value, [hidden, weight])]

    compiled = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    eager = step(loss)
    for _ in range(3):  # runs, is recorded, is replayed
        torch.compiler.cudagraph_mark_step_begin()
        assert all(torch.equal(a, b) for a, b in zip(step(compiled), eager, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("name", STEPS)
def test_public_functions_run_on_the_device_of_their_tensors(name):
    _, here = step_of(name, "cuda:0")
    _, there = step_of(name, "cuda:1")
    with torch.cuda.device(0):
        for a, b in zip(here(), there(), strict=True):
            assert b.device.index == 1
            assert torch.equal(a, b.to(a.device))


def test_rpo_loss_in_place_needs_the_memory_of_the_logits_and_little_more():
    S, T, V = 4, 256, 32_000
    logits = torch.randn(S, T, V, device="cuda", dtype=torch.bfloat16, requires_grad=True) * 1
    labels = torch.randint(V, (S, T), device="cuda")

    def step():
        loss = rpo_loss(logits, labels, None, RPOObjective.simpo(), inplace_backward=True).loss
        torch.autograd.grad(loss, [logits])

    assert peak_memory(step) < 64 * S * T + (1 << 20)
