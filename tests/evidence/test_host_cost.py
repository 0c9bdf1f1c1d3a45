"""What calls cost the CPU: operators go around PyTorch's dispatcher where nobody watches, and
nowhere else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rpo_kernels import (
    RPOObjective,
    preference_loss,
    rpo_loss,
    token_logps,
    token_logps_and_entropy,
)
from rpo_kernels.ops.token_logps import _token_logps

from ..helpers import compiling, needs_a_driver, operator_calls

ROOT = Path(__file__).parents[2]


def measured(tmp_path, rounds):
    """Return the rows of benchmarks/host.py of rpo_loss: of a call, and of call and backward."""
    path = tmp_path / "host.json"
    command = [sys.executable, "benchmarks/host.py", "--rounds", str(rounds), "--json", str(path)]
    environment = compiling(OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())["rows"]["rpo_loss"].values()


@needs_a_driver
def test_rpo_loss_calls_few_python_functions(tmp_path):
    """146 and 201 beyond those of Triton's launches; room for another PyTorch's own."""
    call, step = measured(tmp_path, rounds=1)
    assert (call["launches"], step["launches"]) == (2, 3)
    assert call["frames"] <= 160 and step["frames"] <= 225


@pytest.mark.slow
@needs_a_driver
def test_rpo_loss_costs_the_cpu_little_more_than_its_launches(tmp_path):
    """5.1 x on a quiet machine; room for another one. Of a step, beyond PyTorch's least."""
    for found in measured(tmp_path, rounds=1000):
        assert found["idle"]["quietest ratio"] <= 7, found


def batch():
    logits = torch.randn(4, 3, 7, requires_grad=True)
    labels = torch.randint(7, (4, 3))
    labels[1, 2] = -100
    return logits, labels, torch.randn(4), torch.randn(4)


def losses(logits, labels, rewards, ref_logps, inplace):
    """One of each operator, with all of their backwards."""
    objective = RPOObjective(beta=0.5)
    on_logits = {"backend": "torch", "inplace_backward": inplace}
    out = rpo_loss(logits * 1, labels, rewards, objective, ref_logps=ref_logps, **on_logits)
    logps, entropies = token_logps_and_entropy(logits * 1, labels, **on_logits)
    sums = preference_loss(
        token_logps(logits * 1, labels, **on_logits).sum(1), rewards, objective, ref_logps=ref_logps
    )
    return out.loss + (logps * entropies).sum() + sums.loss


@pytest.mark.parametrize("inplace", [False, True])
def test_operators_in_eager_mode_equal_calls_through_torch_library(inplace):
    arguments = batch()
    ours = losses(*arguments, inplace)
    (gradient,) = torch.autograd.grad(ours, arguments[0])
    with operator_calls() as seen:
        through = losses(*arguments, inplace)
        assert torch.equal(ours, through)
        assert torch.equal(gradient, torch.autograd.grad(through, arguments[0])[0])
    assert len(seen) == 7


def test_operators_are_seen_by_subclasses_and_the_meta_device():
    logits, *_ = batch()
    assert (
        _token_logps.on(logits)
        is _token_logps.on(torch.nn.Parameter(logits.detach()))
        is _token_logps.eager
    )
    for x in (logits.to("meta"), torch.Tensor._make_subclass(_Subclass, logits.detach())):
        assert _token_logps.on(x) == _token_logps._traced


class _Subclass(torch.Tensor):
    pass


def test_operators_under_function_transforms_have_the_same_gradient_or_raise():
    logits, labels, *_ = batch()
    logits = logits.detach()
    loss = lambda x: token_logps(x, labels, backend="torch").sum()
    leaf = logits.clone().requires_grad_()
    assert torch.equal(torch.func.grad(loss)(logits), torch.autograd.grad(loss(leaf), leaf)[0])
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(loss)(logits[None])


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch.func.jvp itself
def test_operators_raise_in_forward_mode():
    logits, labels, *_ = batch()
    tangent = torch.randn_like(logits)
    with pytest.raises(Exception, match=r"jvp|forward"):
        torch.func.jvp(lambda x: token_logps(x, labels), (logits.detach(),), (tangent,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(Exception, match=r"jvp|forward"):
        token_logps(torch.autograd.forward_ad.make_dual(logits.detach(), tangent), labels)


def test_operators_notice_overwritten_logits():
    logits, labels, *_ = batch()
    z = logits * 1
    square = z * z  # needs z in its backward
    loss = token_logps(z, labels, inplace_backward=True, backend="torch").sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


BATCHES = """if True:
    import collections, random, sys
    sys.path.insert(0, "benchmarks")
    import host, torch, triton
    from rpo_kernels import RPOObjective, linear_rpo_loss

    made, make = collections.Counter(), triton.JITFunction._do_compile

    def counting(kernel, *args, **kwargs):
        made[kernel.__name__] += 1
        return make(kernel, *args, **kwargs)

    triton.JITFunction._do_compile = counting
    device, weight = host.device(), torch.randn(100, 8)
    weight = weight.to(device).requires_grad_()
    for step in range(8):
        lengths = [random.Random(step).randint(20, 300) for _ in range(8)]
        labels = torch.randint(100, (sum(lengths),), device=device)
        labels[torch.rand(len(labels), device=device) < 0.3] = -100
        cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
        hidden = torch.randn(len(labels), 8, device=device, requires_grad=True)
        ref_logps, rewards = torch.randn(len(labels), device=device), torch.randn(8, device=device)
        linear_rpo_loss(
            hidden, weight, labels, rewards, RPOObjective(), ref_logps=ref_logps,
            cu_seqlens=cu_seqlens, group_size=4, workspace_bytes=700 * 100 * 4, backend="triton",
        ).loss.backward()
    print(*(made[f"_{x}_kernel"] for x in (
        "group_pass", "vocabulary_forward", "vocabulary_backward")))
"""


@needs_a_driver
def test_launch_compiles_no_other_kernel_for_another_batch():
    """A new kernel stops a training step for seconds. The group pass has one that counts groups,
    and for windows of long and of short sequences one each, where there are several windows and
    where there is one.
    """
    environment = compiling(OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", BATCHES], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    preference, forward, backward = map(int, done.stdout.split())
    assert preference <= 5 and forward == backward == 1
