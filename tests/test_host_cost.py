"""What calls cost the CPU: operators go around PyTorch's dispatcher where nobody watches, and nowhere else."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rpo_kernels import RPOObjective, preference_loss, rpo_loss, token_logps, token_logps_and_entropy
from rpo_kernels.ops import autograd

from .helpers import HAS_GPU, compiling

ROOT = Path(__file__).parent.parent


# Without a GPU there is a libcuda to compile.
needs_a_driver = pytest.mark.skipif(not HAS_GPU and shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")


@needs_a_driver
def test_calls_cost_the_cpu_little_more_than_the_launches_in_them(tmp_path):
    """Timed beside each other in one process: 3 x on a quiet machine, and 5 x through the dispatcher."""
    environment = compiling(OMP_NUM_THREADS="1")
    command = [sys.executable, "benchmarks/host.py", "--rounds", "500", "--json", str(tmp_path / "host.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "host.json").read_text())["rows"]
    row, least = rows["rpo_loss"], rows["an autograd function that does nothing"]["step, us"]
    assert (row["call, launches"], row["step, launches"]) == (2, 3)
    assert row["call, us"] <= 4 * row["call, us of launches"], rows
    assert row["step, us"] - least <= 4 * row["step, us of launches"], rows  # beyond what PyTorch takes for any backward


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.operators.add(operator._schema.name)
        return operator(*args, **(kwargs or {}))


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
    sums = preference_loss(token_logps(logits * 1, labels, **on_logits).sum(1), rewards, objective, ref_logps=ref_logps)
    return out.loss + (logps * entropies).sum() + sums.loss


@pytest.mark.parametrize("inplace", [False, True])
def test_a_call_around_the_dispatcher_is_the_call_through_it(monkeypatch, inplace):
    arguments = batch()
    ours = losses(*arguments, inplace)
    (gradient,) = torch.autograd.grad(ours, arguments[0])
    monkeypatch.setattr(autograd, "is_watched", lambda _: True)
    through = losses(*arguments, inplace)
    assert torch.equal(ours, through)
    assert torch.equal(gradient, torch.autograd.grad(through, arguments[0])[0])


def test_who_watches_sees_the_operators():
    logits, *rest = batch()
    names = {f"rpo_kernels::{x}" for x in ("rpo_loss", "token_logps", "preference_loss", "vocabulary_backward")}
    with _Seen() as seen:
        losses(logits, *rest, False).backward()
    assert names <= seen.operators
    with _Seen() as seen:
        losses(logits, *rest, True).backward()
    assert "rpo_kernels::vocabulary_backward_" in seen.operators

    assert not autograd.is_watched((logits, None, 1, 1.0, "", True))
    assert autograd.is_watched((logits.to("meta"),))
    assert autograd.is_watched((logits, torch.Tensor._make_subclass(_Subclass, logits.detach())))
    told = []
    torch.func.grad(lambda x: told.append(autograd.is_watched((x,))) or x.sum())(logits.detach())
    assert told == [True]


class _Subclass(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch.func.jvp itself
def test_forward_mode_raises_where_it_would_give_zeros():
    logits, labels, *_ = batch()
    tangent = torch.randn_like(logits)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: token_logps(x, labels), (logits.detach(),), (tangent,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        token_logps(torch.autograd.forward_ad.make_dual(logits.detach(), tangent), labels)


def test_over_written_logits_are_noticed_without_the_dispatcher():
    logits, labels, *_ = batch()
    z = logits * 1
    square = z * z  # needs z in its backward
    loss = token_logps(z, labels, inplace_backward=True, backend="torch").sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, whatever device the tensors are on."""
    from rpo_kernels.kernels.launch import on_its_device

    class OnGPU1:
        is_cuda = True

        def get_device(self):
            return 1

    now = [0]

    class device_of:
        def __init__(self, x):
            self.index = x.get_device()

        def __enter__(self):
            now.append(self.index)

        def __exit__(self, *_):
            now.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[-1])
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    where = on_its_device(lambda x: now[-1])
    assert where(OnGPU1()) == 1
    assert now == [0]
    now[:] = [1]
    assert where(OnGPU1()) == 1
    assert where(torch.zeros(1)) == 1


def test_everything_that_launches_does_so_there():
    launching = []
    for path in sorted((ROOT / "rpo_kernels" / "kernels").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                decorators = {getattr(x, "id", None) for x in node.decorator_list}
                source = ast.unparse(node)
                if "_kernel[" in source or " _forward(" in source:
                    launching.append(f"{path.stem}.{node.name}")
                    assert "on_its_device" in decorators, launching[-1]
    assert launching == [
        "preference.preference_forward", "scaling.scale", "shards.combine", "vocabulary.vocabulary_forward",
        "vocabulary.shard_statistics", "vocabulary.vocabulary_backward",
    ]  # fmt: skip


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
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
        linear_rpo_loss(
            torch.randn(len(labels), 8, device=device, requires_grad=True), weight, labels, torch.randn(8, device=device),
            RPOObjective(), ref_logps=torch.randn(len(labels), device=device), cu_seqlens=cu_seqlens, group_size=4,
            workspace_bytes=700 * 100 * 4, backend="triton",
        ).loss.backward()
    print(made["_preference_kernel"], made["_vocabulary_forward_kernel"], made["_vocabulary_backward_kernel"])
"""


@needs_a_driver
def test_another_batch_takes_no_other_kernel():
    """A new kernel stops a training step for seconds. The group pass has one for sums of sequences and two for their tokens."""
    environment = compiling(OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", BATCHES], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    preference, forward, backward = map(int, done.stdout.split())
    assert preference <= 3 and forward == backward == 1
