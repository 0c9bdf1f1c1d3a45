"""Launches: what was compiled for the same types is launched again, on the device of its tensors, as Triton would launch it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rpo_kernels.kernels.launch import Launcher

from .helpers import compiling, needs_a_driver

ROOT = Path(__file__).parent.parent


class _Kernel:
    """Stands for a kernel: notes its launches, and returns what stands for its compiled form."""

    arg_names = ("x_ptr", "out_ptr", "n", "factor", "BLOCK")

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launched.append(("looked at", grid, args, constants))
            return _Compiled(self)

        return launch


class _Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.launched.append(("known", grid, args, {}))


CONSTANTS = {"BLOCK": 8, "num_warps": 4}


def test_what_was_compiled_for_the_same_types_is_launched_without_a_look():
    kernel = _Kernel()
    launch, x = Launcher(kernel), torch.zeros(3)
    launch(2, (x, None), (7,), (1,), CONSTANTS)
    launch(5, (x, None), (1,), (0.5,), CONSTANTS)
    assert kernel.launched == [
        ("looked at", (2,), (x, None, 7, 1.0), CONSTANTS),
        ("known", (5, 1, 1), (x, None, 1, 0.5, 8), {}),
    ]
    assert type(kernel.launched[0][2][3]) is float  # what is compiled for the integer 1 takes no other number


@pytest.mark.parametrize(
    "pointers, integers, constants",
    [
        ((torch.zeros(3, dtype=torch.int32), None), (7,), CONSTANTS),
        ((torch.zeros(3), torch.zeros(3)), (7,), CONSTANTS),
        ((torch.zeros(3, device="meta"), None), (7,), CONSTANTS),
        ((torch.zeros(3), None), (2**31,), CONSTANTS),
        ((torch.zeros(3), None), (-(2**31) - 1,), CONSTANTS),
        ((torch.zeros(3), None), (7,), CONSTANTS | {"BLOCK": 16}),
        ((torch.zeros(3), None), (7,), CONSTANTS | {"num_warps": 8}),
        ((torch.zeros(3), None), (7,), CONSTANTS | {"maxnreg": 64}),
    ],
)
def test_triton_looks_where_it_may_compile_something_else(pointers, integers, constants):
    kernel = _Kernel()
    launch = Launcher(kernel)
    for _ in range(2):
        launch(1, (torch.zeros(3), None), (7,), (1.0,), CONSTANTS)
    launch(1, pointers, integers, (1.0,), constants)
    assert [how for how, *_ in kernel.launched] == ["looked at", "known", "looked at"]


def test_integers_of_64_bits_are_looked_at_every_time():
    kernel = _Kernel()
    launch = Launcher(kernel)
    for n in (2**31, 2**31, 7, 7):
        launch(1, (torch.zeros(3), None), (n,), (1.0,), CONSTANTS)
    assert [how for how, *_ in kernel.launched] == ["looked at", "looked at", "looked at", "known"]


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, whatever device the tensors are on."""

    class OnGPU1:
        device, dtype = torch.device("cuda:1"), torch.float32

    now = [0]

    class device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            now.append(self.index)

        def __exit__(self, *_):
            now.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    seen = []

    class Noting(_Kernel):
        def __getitem__(self, grid):
            seen.append(now[-1])
            return super().__getitem__(grid)

    launch = Launcher(Noting())
    launch(1, (OnGPU1(), None), (7,), (1.0,), CONSTANTS)
    assert seen == [1] and now == [0]
    now[:] = [1]
    launch(1, (OnGPU1(), None), (2**31,), (1.0,), CONSTANTS)
    assert seen == [1, 1] and now == [1]
    now[:] = [0]
    launch(1, (torch.zeros(3), None), (7,), (1.0,), CONSTANTS)
    assert seen == [1, 1, 0]


def test_every_kernel_of_the_package_is_launched_so():
    """Nowhere as kernel[grid](...)."""
    kernels, launched = set(), set()
    for path in sorted((ROOT / "rpo_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("_") and node.name.endswith("_kernel"):
                kernels.add(node.name)
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Launcher":
                launched.add(node.args[0].id)
            if isinstance(node, ast.Subscript):
                assert not ast.unparse(node.value).endswith("_kernel"), (path, ast.unparse(node))
    assert kernels == launched and len(kernels) == 6


TWICE = """if True:
    import random, sys
    sys.path.insert(0, "benchmarks")
    import host, torch, triton
    from triton.backends.nvidia.driver import CudaLauncher
    import rpo_kernels
    from rpo_kernels import RPOObjective, linear_rpo_loss, rpo_loss, token_logps_and_entropy
    from rpo_kernels.kernels import preference, scaling, shards, vocabulary

    device = host.device()
    MODULES = preference, scaling, shards, vocabulary
    LAUNCHERS = [x for module in MODULES for x in vars(module).values() if hasattr(x, "_compiled")]
    assert len(LAUNCHERS) == 6, LAUNCHERS
    looked, seen = [], []
    run, launch = triton.JITFunction.run, CudaLauncher.__call__

    def looking(kernel, *args, **kwargs):
        looked.append(kernel.__name__)
        for name, x in zip(kernel.arg_names, args):
            param = kernel.params[kernel.arg_names.index(name)]
            assert not param.is_constexpr
            if isinstance(x, torch.Tensor):
                assert param.do_not_specialize_on_alignment, (kernel.__name__, name)
            if isinstance(x, int):
                assert param.do_not_specialize, (kernel.__name__, name)
        return run(kernel, *args, **kwargs)

    def launching(self, x, y, z, stream, function, metadata, about, enter, leave, *args):
        shown = [(a.dtype, a.shape, a.stride()) if isinstance(a, torch.Tensor) else (type(a), a) for a in args]
        seen.append((id(self), (x, y, z), shown))
        return launch(self, x, y, z, stream, function, metadata, about, enter, leave, *args)

    triton.JITFunction.run, CudaLauncher.__call__ = looking, launching

    def on_logits(dtype, integers, V, softcap, objective, packed, K, ignore_index=-100):
        S, T = 4, 6
        shape = (S * T,) if packed else (S, T)
        logits = torch.randn(*shape, V, device=device).to(dtype).requires_grad_()
        labels = torch.randint(V, shape, device=device, dtype=integers)
        cu_seqlens = torch.arange(0, S * T + 1, T, device=device, dtype=torch.int32) if packed else None
        groups = {"group_size": K} if K else {"cu_groups": torch.tensor([0, 1, 4], dtype=torch.int32, device=device)}
        ref_logps = None if objective.reference == "none" else torch.randn(S, device=device)
        options = {"softcap": softcap, "backend": "triton", "ignore_index": ignore_index}
        rewards = torch.randn(S, device=device) if objective.uses_rewards else None
        out = rpo_loss(logits, labels, rewards, objective, ref_logps=ref_logps, cu_seqlens=cu_seqlens, **groups, **options)
        out.loss.backward()
        if softcap:
            logps, entropies = token_logps_and_entropy(logits, labels, **options)
            (logps * entropies).sum().backward()

    def linear(dtype, V):
        hidden = torch.randn(2, 5, 16, device=device).to(dtype).requires_grad_()
        weight = torch.randn(V, 16, device=device).to(dtype).requires_grad_()
        labels, rewards = torch.randint(V, (2, 5), device=device), torch.randn(2, device=device)
        (2 * linear_rpo_loss(hidden, weight, labels, rewards, RPOObjective(), ref_logps=rewards, backend="triton").loss).backward()

    def shard(entropy):
        statistics = torch.randn(2, 4 if entropy else 3, 7, device=device)
        labels = torch.zeros(7, device=device, dtype=torch.int64)
        shards.combine(statistics, labels, temperature=1.0, logit_scale=1.0, softcap=0.0, ignore_index=-100, entropy=entropy)

    split = vocabulary.splits_rows
    def few_rows(*args):
        vocabulary.splits_rows = lambda *_: True
        on_logits(*args)
        vocabulary.splits_rows = split

    dpo, long, short = RPOObjective(), torch.int64, torch.int32
    cases = [
        (on_logits, torch.float32, long, 33, None, dpo, False, 2),
        (on_logits, torch.float32, long, 48, None, RPOObjective(beta=1, eta=1), False, 2),
        (on_logits, torch.float32, short, 33, None, dpo, False, 2),
        (on_logits, torch.float32, long, 33, None, dpo, True, 0),
        (on_logits, torch.float16, long, 33, 30.0, dpo, False, 2),
        (on_logits, torch.float32, long, 33, None, RPOObjective.simpo(), False, 2),
    ]
    cases += [(on_logits, torch.float32, torch.int64, 33, None, dpo, False, 2, -(2**40))]
    cases += [(few_rows, torch.float32, torch.int64, 40_000, None, dpo, False, 2)]
    cases += [(linear, torch.float32, 30), (linear, torch.float32, 32)]
    cases += [(shard, False), (shard, True)]

    def launches(function, *args):
        looked.clear(), seen.clear()
        torch.manual_seed(0)
        function(*args)
        return list(seen)

    by_triton = []
    for case in cases:
        for launcher in LAUNCHERS:
            launcher._compiled.clear()
        by_triton.append(launches(*case))
        assert looked
    order = list(range(len(cases)))
    for _ in range(2):  # the second time all are known
        random.Random(0).shuffle(order)
        for i in order:
            assert launches(*cases[i]) == by_triton[i], (cases[i], seen, by_triton[i])
            wide = -(2**40) in cases[i]
            assert wide or _ == 0 or not looked, (cases[i], looked)
    print(sum(map(len, by_triton)), len({x for launched in by_triton for x, *_ in launched}))
"""


@needs_a_driver
def test_known_launches_are_those_that_triton_makes(tmp_path):
    """The same machine code with the same arguments, over dtypes, layouts, objectives, and integers of 64 bits."""
    environment = compiling(OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", TWICE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    made, compiled = map(int, done.stdout.split())
    assert made > 30 and compiled > 15
