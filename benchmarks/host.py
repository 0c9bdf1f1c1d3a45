"""CPU time of calls, compared with the bare Triton launches in them.

Without a GPU a libcuda that does nothing takes its place (it takes a C compiler): kernels are
compiled for an H100 and launched into the void. What remains is Python, PyTorch and Triton's own
launcher. CPU tensors pass for a GPU's: nobody looks at their values. Times are medians over calls
in a loop, in CPU time of the thread (on a GPU of the process: a backward has its own thread).
Beside each call stand its launches made bare, `kernel[grid](...)`, in a loop of nothing else. The
loops take turns, and a ratio is the median over the turns, with its quartiles. "Frames" are the
Python functions called, without those of bare launches: no machine's noise changes them.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import pairs
import torch
import triton

from rpo_kernels import RPOObjective, backend, checks, rpo_loss, token_logps

HAS_GPU = torch.cuda.is_available()
clock = time.process_time if HAS_GPU else time.thread_time


# what Triton's launcher links to: every function succeeds at once
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
NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit) NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuLaunchKernelEx) NOTHING(cuOccupancyMaxActiveClusters) NOTHING(cuTensorMapEncodeTiled)
"""


def no_driver() -> object:
    """Return Triton's driver for an absent H100: its own launcher, down to the calls of libcuda."""
    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
    library = folder / "libcuda.so.1"
    (folder / "libcuda.c").write_text(LIBCUDA)
    compiler = os.environ.get("CC", "cc")
    subprocess.run(
        [
            compiler,
            "-shared",
            "-fPIC",
            "-O2",
            "-Wl,-soname,libcuda.so.1",
            folder / "libcuda.c",
            "-o",
            library,
        ],
        check=True,
    )
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class NoDriver(CudaDriver):
        def __init__(self):
            self.folder = temporary  # deleted with the process
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda _: 0
            self.get_device_capability = lambda _: (9, 0)

    return NoDriver()


def device() -> torch.device:
    """Return a GPU, or a substitute for the rest of this process."""
    if HAS_GPU:
        return torch.device("cuda")
    triton.runtime.driver.set_active(no_driver())
    os.environ[backend.ON_CPU] = "1"
    checks.may_read = lambda _: False
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
    """Return each kind of call: a function that returns a loss, and the leaf with a gradient."""
    S, T, V = 4, 8, 1024
    logits = torch.randn(S, T, V, device=device, requires_grad=True)
    labels = torch.randint(V, (S, T), device=device)
    rewards, ref_logps = torch.randn(S, device=device), torch.randn(S, device=device)
    objective = RPOObjective()
    return {
        LEAST: (lambda: _Nothing.apply(logits), logits),
        "rpo_loss": (
            lambda: (
                rpo_loss(
                    logits, labels, rewards, objective, ref_logps=ref_logps, backend="triton"
                ).loss
            ),
            logits,
        ),
        "a product, and rpo_loss in place": (
            lambda: (
                rpo_loss(
                    logits * 1,
                    labels,
                    rewards,
                    objective,
                    ref_logps=ref_logps,
                    inplace_backward=True,
                    backend="triton",
                ).loss
            ),
            logits,
        ),
        "token_logps and its sum": (
            lambda: token_logps(logits, labels, backend="triton").sum(),
            logits,
        ),
    }


@contextmanager
def bare_launches() -> Iterator[list[Callable[[], object]]]:
    """Context that yields a list of launches of the package, which Triton alone can repeat."""
    run, bare = triton.JITFunction.run, []

    def record(kernel, *arguments, **options):
        bare.append(lambda: run(kernel, *arguments, **options))
        return run(kernel, *arguments, **options)

    with mock.patch.object(triton.JITFunction, "run", record):
        yield bare


def frames(function: Callable[[], object]) -> int:
    """Return how many Python functions a call of one calls."""
    seen = []
    sys.setprofile(lambda frame, event, _: seen.append(frame) if event == "call" else None)
    try:
        function()
    finally:
        sys.setprofile(None)
    return len(seen)


BLOCKS = 20  # of calls in a loop, in which all take turns
LEAST = "an autograd function that does nothing"


def run(rounds: int) -> dict[str, dict[str, dict]]:
    """Of each kind of call, and of call and backward ("step"): its launches and frames, and idle
    and busy (see `pairs`) the microseconds that it takes, those of its launches made bare, and the
    ratio of both: of a step, what is beyond PyTorch's least; and the ratio of each one's quietest
    turn.
    """
    rows, timed = {}, {}
    for name, (call, leaf) in calls(device()).items():

        def step(call=call, leaf=leaf):
            call().backward()
            leaf.grad = None

        step()
        rows[name] = {}
        for kind, function in (("call", call), ("step", step)):
            with bare_launches() as bare:
                function()
            repeat = lambda bare=bare: [launch() for launch in bare]
            rows[name][kind] = {
                "launches": len(bare),
                "frames": frames(function) - frames(repeat),
            }
            timed[name, kind, "us"], timed[name, kind, "bare"] = function, repeat
    for condition in pairs.CONDITIONS[:1] if HAS_GPU else pairs.CONDITIONS:
        with pairs.cores(condition):
            blocks = [
                {
                    key: _median(function, max(1, rounds // BLOCKS))
                    for key, function in timed.items()
                }
                for _ in range(BLOCKS)
            ]
        for name, row in rows.items():
            for kind, found in row.items():
                us, bare = ([x[name, kind, what] for x in blocks] for what in ("us", "bare"))
                least = [x[LEAST, kind, "us"] if kind == "step" else 0.0 for x in blocks]
                found[condition] = {
                    "us": round(statistics.median(us), 1),
                    "bare us": round(statistics.median(bare), 1),
                    "ratio": pairs.spread([(x - z) / y for x, y, z in zip(us, bare, least)]),
                    "quietest ratio": round((min(us) - min(least)) / min(bare), 2),
                }
    return rows


def _median(function: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = clock()
        function()
        seconds.append(clock() - start)
    synchronize()
    return 1e6 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import results

    rows = run(args.rounds)
    print(results.host_table(rows))
    if args.json:
        about = results.about(
            "cuda" if HAS_GPU else "cpu",
            "S 4, T 8, V 1024",
            launches="run" if HAS_GPU else "end in a libcuda that does nothing",
        )
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
