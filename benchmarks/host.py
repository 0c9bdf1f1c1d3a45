"""What a call costs the CPU beside the bare Triton launches in it: `python benchmarks/host.py [--json FILE]`.

Without a GPU a driver that does nothing takes its place: kernels are compiled for an H100 and launched into the void, so that what
remains is Python, PyTorch and Triton's own launcher, up to the driver's call. CPU tensors pass for a GPU's: nobody looks at their
values. Times are medians over calls in a loop, in CPU time of the thread (on a GPU in wall time). Launches are timed where they
happen, within the calls, and once more alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton

from rpo_kernels import RPOObjective, backend, checks, rpo_loss, token_logps

HAS_GPU = torch.cuda.is_available()
clock = time.perf_counter if HAS_GPU else time.thread_time


class _NoDriver:
    """What Triton asks of a driver, for one H100 that is not there."""

    class launcher_cls:
        def __init__(self, *_):
            pass

        def __call__(self, *_):
            pass

    class utils:
        load_binary = staticmethod(lambda *_: (1, 1, 32, 0, 1024))
        unload_module = staticmethod(lambda *_: None)
        get_device_properties = staticmethod(lambda _: {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32})

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda _: 0)
    get_current_target = staticmethod(lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32))
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
    assemble_tensormap_to_arg = staticmethod(lambda *_: None)


def device() -> torch.device:
    """A GPU, or, for the rest of this process, what passes for one."""
    if HAS_GPU:
        return torch.device("cuda")
    triton.runtime.driver.set_active(_NoDriver())
    backend.interpreted = lambda: True
    checks._readable = lambda _: False
    return torch.device("cpu")


def synchronize() -> None:
    if HAS_GPU:
        torch.cuda.synchronize()


class _Nothing(torch.autograd.Function):
    """The least that a function with a gradient costs."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.new_empty(())

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors[0]


def calls(device: torch.device) -> dict[str, tuple[Callable[[], torch.Tensor], torch.Tensor]]:
    """Of each kind of call: what it returns a loss from, and the leaf that gets a gradient."""
    S, T, V = 4, 8, 1024
    logits = torch.randn(S, T, V, device=device, requires_grad=True)
    labels = torch.randint(V, (S, T), device=device)
    rewards, ref_logps = torch.randn(S, device=device), torch.randn(S, device=device)
    objective = RPOObjective()
    return {
        "an autograd function that does nothing": (lambda: _Nothing.apply(logits), logits),
        "rpo_loss": (lambda: rpo_loss(logits, labels, rewards, objective, ref_logps=ref_logps, backend="triton").loss, logits),
        "rpo_loss, in place": (
            lambda: (
                rpo_loss(logits * 1, labels, rewards, objective, ref_logps=ref_logps, inplace_backward=True, backend="triton").loss
            ),
            logits,
        ),
        "token_logps and its sum": (lambda: token_logps(logits, labels, backend="triton").sum(), logits),
    }


class _Launches:
    """Triton's launches: those of one call to make again, and the time that they take within calls."""

    def __init__(self) -> None:
        self.recorded: list[Callable[[], object]] = []
        self.seconds = 0.0
        self._run = triton.JITFunction.run

    @contextmanager
    def record(self) -> Iterator[None]:
        self.recorded = []

        def run(kernel, *args, **kwargs):
            self.recorded.append(lambda: self._run(kernel, *args, **kwargs))
            return self._run(kernel, *args, **kwargs)

        with mock.patch.object(triton.JITFunction, "run", run):
            yield

    @contextmanager
    def timed(self) -> Iterator[None]:
        def run(kernel, *args, **kwargs):
            start = clock()
            result = self._run(kernel, *args, **kwargs)
            self.seconds += clock() - start
            return result

        with mock.patch.object(triton.JITFunction, "run", run):
            yield

    def again(self) -> None:
        for launch in self.recorded:
            launch()


def run(rounds: int) -> dict[str, dict[str, float]]:
    """Of each kind of call, medians in microseconds: the call, call and backward, and the launches of each, within and alone."""
    launches, rows = _Launches(), {}
    for name, (call, leaf) in calls(device()).items():
        rows[name] = {}

        def step(call=call, leaf=leaf):
            call().backward()
            leaf.grad = None

        step()
        for kind, function in (("call", call), ("step", step)):
            with launches.record():
                function()
            whole, within, alone = [], [], []
            with launches.timed():
                for _ in range(rounds):
                    launches.seconds = 0.0
                    start = clock()
                    function()
                    whole.append(clock() - start)
                    within.append(launches.seconds)
            synchronize()
            for _ in range(rounds):
                start = clock()
                launches.again()
                alone.append(clock() - start)
            synchronize()
            whole, within, alone = (round(1e6 * statistics.median(x), 1) for x in (whole, within, alone))
            rows[name] |= {f"{kind}, launches": len(launches.recorded), f"{kind}, us": whole, f"{kind}, us of launches": within}
            rows[name][f"{kind}, us of the same launches alone"] = alone
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import results

    rows = run(args.rounds)
    print(results.host_table(rows))
    if args.json:
        about = results.about(
            "cuda" if HAS_GPU else "cpu", "S 4, T 8, V 1024", launches="run" if HAS_GPU else "end before the driver"
        )
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
