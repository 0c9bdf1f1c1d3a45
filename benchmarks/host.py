"""What a call costs the CPU beside the bare Triton launches in it: `python benchmarks/host.py [--json FILE]`.

Without a GPU a libcuda that does nothing takes its place (it takes a C compiler): kernels are compiled for an H100 and launched
into the void. What remains is Python, PyTorch and Triton's own launcher. CPU tensors pass for a GPU's: nobody looks at their
values. Times are medians over calls in a loop, of the quietest of five, in CPU time of the thread (on a GPU in wall time). Launches
are timed where they happen, within the calls, and once more alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import tempfile
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


# What Triton's launcher links to, with nothing behind it: every call succeeds at once.
LIBCUDA = """
typedef unsigned long long ull;
#define DOES(name, arguments, what) int name arguments { what; return 0; }
#define NOTHING(name) int name() { return 0; }
DOES(cuCtxGetCurrent, (void **context), *context = (void *)1)
DOES(cuPointerGetAttribute, (ull *data, int attribute, ull pointer), *data = pointer)
DOES(cuDeviceGet, (int *device, int ordinal), *device = 0)
DOES(cuDeviceGetAttribute, (int *value, int attribute, int device), *value = 232448)
DOES(cuFuncGetAttribute, (int *value, int attribute, void *function), *value = attribute ? 0 : 1024)
DOES(cuModuleLoadData, (void **module, void *image), *module = (void *)1)
DOES(cuModuleGetFunction, (void **function, void *module, char *name), *function = (void *)1)
DOES(cuDriverGetVersion, (int *version), *version = 13000)
DOES(cuDevicePrimaryCtxRetain, (void **context, int device), *context = (void *)1)
DOES(cuGetErrorString, (int error, const char **text), *text = "none")
DOES(cuCtxGetLimit, (ull *value, int limit), *value = 0)
NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit) NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig)
NOTHING(cuLaunchKernelEx) NOTHING(cuOccupancyMaxActiveClusters) NOTHING(cuTensorMapEncodeTiled)
"""


def no_driver() -> object:
    """Triton's driver for one H100 that is not there: its own launcher, down to the calls of libcuda."""
    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
    library = folder / "libcuda.so.1"
    (folder / "libcuda.c").write_text(LIBCUDA)
    compiler = os.environ.get("CC", "cc")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", folder / "libcuda.c", "-o", library], check=True
    )
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class NoDriver(CudaDriver):
        def __init__(self):
            self.folder = temporary  # goes with the process
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda _: 0
            self.get_device_capability = lambda _: (9, 0)

    return NoDriver()


def device() -> torch.device:
    """A GPU, or, for the rest of this process, what passes for one."""
    if HAS_GPU:
        return torch.device("cuda")
    triton.runtime.driver.set_active(no_driver())
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


BLOCKS = 5  # of calls in a loop; the quietest counts, whole and its parts together


def run(rounds: int) -> dict[str, dict[str, float]]:
    """Of each kind of call, microseconds: the call, call and backward, and the launches of each, within and alone."""
    launches, kinds, best = _Launches(), {}, {}
    for name, (call, leaf) in calls(device()).items():

        def step(call=call, leaf=leaf):
            call().backward()
            leaf.grad = None

        step()
        for kind, function in (("call", call), ("step", step)):
            with launches.record():
                function()
            kinds[name, kind] = function, launches.recorded
    for _ in range(BLOCKS):
        for key, (function, recorded) in kinds.items():
            block = _block(function, recorded, launches, max(1, rounds // BLOCKS))
            best[key] = min(best.get(key, block), block)
    rows = {name: {} for name, _ in kinds}
    for (name, kind), (whole, within, alone) in best.items():
        rows[name] |= {f"{kind}, launches": len(kinds[name, kind][1]), f"{kind}, us": whole, f"{kind}, us of launches": within}
        rows[name][f"{kind}, us of the same launches alone"] = alone
    return rows


def _block(function: Callable[[], object], recorded: list, launches: _Launches, rounds: int) -> tuple[float, float, float]:
    """Medians in a loop: of the whole, of the launches within, and of the same launches alone."""
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
        for launch in recorded:
            launch()
        alone.append(clock() - start)
    synchronize()
    return tuple(round(1e6 * statistics.median(x), 1) for x in (whole, within, alone))


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
            "cuda" if HAS_GPU else "cpu", "S 4, T 8, V 1024", launches="run" if HAS_GPU else "end in a libcuda that does nothing"
        )
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
