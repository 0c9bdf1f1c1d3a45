"""Every kernel as the IR that Triton's own frontend makes of it, executed with each access checked.

    make sanitize                               # or, where pypi.org/project/ttsem is installed:
    # cases whose row holds each word: split, odd, ...
    python -m tests.evidence.sanitize [--only WORD ...]

No GPU is needed. Found are accesses outside of a tensor, operations without a defined result,
elements that two programs of a launch touch, one of them writing, and results that are not those of
float64. Tensors fill their memory to the last byte, ``odd`` ones from one element past a multiple
of 16 bytes on, and memory that nobody wrote holds NaN. First, faults that are planted in copies of
the package must be found. Not seen: threads of one program against each other, and what comes after
that IR (PTX, registers; chips other than sm_90).

Exit code 1 for a fault, a race, a launch not checked, a wrong number, or a planted fault missed.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import rpo_kernels
from rpo_kernels import RPOObjective, reference
from rpo_kernels.objectives import COMPARISONS, DISTANCES

BOTH, FP32 = (torch.float32, torch.bfloat16), (torch.float32,)


def placed(x: Tensor, odd: bool) -> Tensor:
    """A copy whose storage is its elements alone, 16-byte aligned or one element past it."""
    memory = torch.empty(x.numel() * x.element_size() + 32, dtype=torch.uint8)
    offset = -memory.data_ptr() % 16 + odd * x.element_size()
    copy = torch.frombuffer(memory.numpy(), dtype=x.dtype, count=x.numel(), offset=offset)
    return copy.view(x.shape).copy_(x)


# ---- cases: (dtype, odd, **options) -> pairs of tensors, (ours, the truth) -----------------------


def rows(dtype, odd, V=1304, entropy=False, inplace=False, gap=False, split=False, ranks=1, **z):
    """token_logps of ``[2, 3, V]`` and its gradient: with ranks, of this one's columns.

    Rows are ordinary, sure of the label, sure of another token (and so read again), and ignored.
    ``z``: how logits are scaled.
    """
    V -= odd
    labels = torch.tensor([[0, V - 1, V // 2], [-100, 1, V - 2]])
    x = torch.randn(2, 3, V) * 4
    x[0, 1, V - 1] += 40
    x[0, 2, 3] += 90
    x, weights = x.to(dtype), torch.randn(2, *labels.shape)
    wide = x.double().requires_grad_()
    truth = [reference.token_logps(wide, labels, **z)]
    truth += [reference.token_entropy(wide, labels, **z)] if entropy else []
    (gradient,) = torch.autograd.grad(truth, wide, list(weights[: len(truth)].double()))

    cut = [0, V // 2 + 5, V] if ranks == 2 else [0, V]
    group = dist.group.WORLD if ranks == 2 else None
    columns = slice(*cut[dist.get_rank() if group else 0 :][:2])
    memory = torch.cat([x, x[:, :1]], dim=1) if gap else x  # a row between the sequences
    logits = placed(memory[..., columns], odd).requires_grad_().view(*memory.shape[:2], -1)[:, :3]
    call = rpo_kernels.token_logps_and_entropy if entropy else rpo_kernels.token_logps
    # Short parts, so that short rows have several; and a CPU has no multiprocessors, for which a
    # batch of few rows would be split.
    launch = {"PART": 512, "multiprocessors": lambda device: 132 if split else 0}
    with mock.patch.multiple("rpo_kernels.kernels.launch", **launch):
        options = {"inplace_backward": inplace, "process_group": group, **z}
        ours = call(logits, placed(labels, odd), backend="triton", **options)
        ours = ours if entropy else [ours]
        (dlogits,) = torch.autograd.grad(ours, logits, list(weights[: len(truth)]))
    return [*zip(ours, truth), (dlogits, gradient[..., columns])]


def groups(dtype, odd, bounds=(0, 2, 3, 9, 9, 79), **objective):
    """preference_loss of ragged groups: one of 70 responses, one of one, one empty."""
    logps, ref_logps, rewards = torch.randn(3, bounds[-1])
    cu_groups = torch.tensor(bounds, dtype=torch.int32)
    objective = RPOObjective(beta=0.3, eta=0.7, **objective)
    options = {"cu_groups": cu_groups, "ref_logps": ref_logps}
    return with_loss("preference_loss", [logps], [rewards], objective, odd, **options)


def tokens(dtype, odd, op="rpo_loss", T=3, packed=False, **objective):
    """rpo_loss or linear_rpo_loss of sequences, some of whose tokens are not scored."""
    V, H, S = 6, 144 - odd, 12 if T < 64 else 6  # dhidden has more elements than one program scales
    shape, options = (S, T), {"cu_groups": torch.arange(0, S + 1, 2, dtype=torch.int32)}
    if packed:
        ends = itertools.accumulate([3, 1, 0, 5, 3, 3, 2, 2, 3, 2, 5, 3])
        options["cu_seqlens"] = torch.tensor([0, *ends], dtype=torch.int32)
        options["cu_groups"] = torch.tensor([0, 2, 3, 9, 9, 12], dtype=torch.int32)
        shape = (32,)
    labels = torch.randint(0, V, shape).masked_fill(torch.rand(shape) < 0.25, -100)
    options["ref_logps"] = -5 * torch.rand(shape)
    if "reference" in objective:
        options |= {"ref_logps": -5 * torch.rand(3, *shape), "ref_weights": torch.full((3,), 1 / 3)}
    leaves = [torch.randn(*shape, V)]
    if op == "linear_rpo_loss":
        leaves = [torch.randn(*shape, H), torch.randn(V, H) / 12]
    leaves, objective = [x.to(dtype) for x in leaves], RPOObjective(beta=0.3, eta=0.7, **objective)
    return with_loss(op, leaves, [labels, torch.randn(S)], objective, odd, **options)


def with_loss(op, leaves, args, objective, odd, **options):
    """Loss, implicit rewards, and gradients times 3, by which those that are early are scaled."""

    def results(module: object, convert: object, **backend: str) -> list[Tensor]:
        x = [convert(leaf).requires_grad_() for leaf in leaves]
        converted = {name: convert(value) for name, value in options.items()}
        out = getattr(module, op)(*x, *map(convert, args), objective, **converted, **backend)
        return [out.loss, out.rewards, *torch.autograd.grad(3 * out.loss, x)]

    ours = results(rpo_kernels, lambda x: placed(x, odd), backend="triton")
    return [*zip(ours, results(reference, lambda x: x.double() if x.is_floating_point() else x))]


SOFTCAP = {"softcap": 30.0, "temperature": 0.7}
SOFTMAX = {"bounds": (0, 2, 3, 9), "distance": "backward_kl", "target": "softmax"}
HARMONIC = {"reference": "harmonic", "sft_weight": 0.2, "sft_normalizer": "tokens"}
AVERAGE = {"average": True, "sft_weight": 0.2, "sft_normalizer": "mean"}
ROWS, TOKENS = "forward backward", "forward group_pass backward"
SPLIT, SHARDS = "forward merge backward", "forward combine backward"
SPLIT_SHARDS, LINEAR = "forward merge combine backward", "forward backward group_pass scale scale"
LONG = {"V": 5000}  # the launch table has other tiles for them
CASES = {  # name: (kernels in the order of their launches, dtypes, function, its options)
    "rows": (ROWS, BOTH, rows, {}),
    "rows, entropy, softcap": (ROWS, BOTH, rows, {"entropy": True, **SOFTCAP}),
    "rows, with a gap": (ROWS, BOTH, rows, {"gap": True}),
    "rows, in place": (ROWS, BOTH, rows, {"inplace": True}),
    "rows, few columns": (ROWS, BOTH, rows, {"V": 6}),
    "rows, long, in place": (ROWS, BOTH, rows, {"inplace": True, "entropy": True, **LONG}),
    "rows, split": (SPLIT, BOTH, rows, {"split": True, **LONG}),
    "rows, split, entropy": (SPLIT, BOTH, rows, {"split": True, "entropy": True, "gap": True}),
    "rows, split, in place": (SPLIT, BOTH, rows, {"split": True, "inplace": True, **LONG}),
    "shards": (SHARDS, BOTH, rows, {"ranks": 2}),
    "shards, entropy": (SHARDS, BOTH, rows, {"ranks": 2, "entropy": True, "inplace": True}),
    "shards, split": (SPLIT_SHARDS, BOTH, rows, {"ranks": 2, "split": True, **LONG}),
    **{
        f"groups, {x}, {y}": ("group_pass", FP32, groups, {"distance": x, "comparison": y})
        for x, y in itertools.product(DISTANCES, COMPARISONS)
    },
    "groups, softmax": ("group_pass", FP32, groups, {"comparison": "pointwise", **SOFTMAX}),
    "groups, one response": ("group_pass", FP32, groups, {"bounds": (0, 1)}),
    "tokens, pairs": (TOKENS, BOTH, tokens, {}),
    "tokens, average": (TOKENS, BOTH, tokens, {"T": 70, **AVERAGE}),
    "tokens, packed, harmonic": (TOKENS, BOTH, tokens, {"packed": True, **HARMONIC}),
    "linear": (LINEAR, BOTH, tokens, {"op": "linear_rpo_loss"}),
}  # fmt: skip


# ---- what is found -------------------------------------------------------------------------------


def found(name: str, dtype: torch.dtype, odd: bool, rank: int, store: str) -> tuple:
    """(launches, faults, races, launches not checked, error over what rounding allows, report)."""
    from ttsem import sanitize

    kernels, _, function, options = CASES[name]
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # new memory holds NaN
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="ttsem")  # IEEE's inf and NaN
    if ranks := options.get("ranks"):
        join = {"store": dist.FileStore(store), "rank": rank, "world_size": ranks}
        dist.init_process_group("gloo", timeout=timedelta(minutes=1), **join)
    reports, faults, unjudged, error = [], 0, 0, float("inf")
    with sanitize.session(cuda_is_cpu=False, races="record") as session:
        try:
            # The session says that there is a GPU, but not whether that is capturing a graph.
            with mock.patch("torch.cuda.is_available", lambda: False):
                error = max(off(*pair) for pair in function(dtype, odd, **options))
        except sanitize.Unjudged as stop:
            unjudged, reports = 1, [f"not judged: {stop}"]
        except Exception as stop:  # a fault, or what comes of the other rank's
            faults, reports = 1, [f"{type(stop).__name__}: {stop}"]
    if ranks:
        dist.destroy_process_group()
    reports += map(sanitize.message, session.races)
    if session.races_unchecked:
        reports.append("a launch was too large to be checked for races")
    if not reports and session.launches != len(kernels.split()):
        reports.append(f"expected launches of {kernels}, got {session.launches}")
    if not reports and error > 1:
        reports.append(f"wrong numbers: {error:.3g} times what rounding allows")
    unchecked = session.races_unchecked + unjudged
    report = "".join(f"\n    {x}" for x in reports)
    return session.launches, faults, len(session.races), unchecked, error, report


def off(ours: Tensor, truth: Tensor) -> float:
    """Largest error, over 4e-6 of the largest magnitude and in bf16 an ulp of it."""
    ours, truth = ours.detach(), truth.detach()
    allowed = 4e-6 + (torch.finfo(ours.dtype).eps if ours.dtype == torch.bfloat16 else 0)
    error = (ours.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30) / allowed
    return float(error.nan_to_num(nan=torch.inf))


# (file of kernels/, what it says, what a copy says instead, what must be reported)
FORWARD, STORE = "vocabulary_forward.py", "tl.store(out.logps + row, "
PLANTED = {
    "a load without its mask": (
        *(
            "rows.py",
            "tl.load(columns.ptr + cols, mask=valid, other=0.0), to, FLAGS)\n    here",
            "tl.load(columns.ptr + cols), to, FLAGS)\n    here",
        ),
        "of the tensor passed as `logits_ptr`",
    ),
    "two programs that write one element": (
        *(FORWARD, f"{STORE}logp)", "tl.store(out.logps + row // 2, logp)"),
        "both touch element",
    ),
    "an output that is not written": (FORWARD, f"{STORE}0.0)", "pass", "wrong numbers: inf"),
}


def missed(fault: str) -> str:
    """Nothing if this planted fault is found, else what was printed."""
    file, old, new, report = PLANTED[fault]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(Path(rpo_kernels.__file__).parent, Path(folder, "rpo_kernels"))
        shutil.copy(__file__, folder)
        source = Path(folder, "rpo_kernels", "kernels", file)
        source.write_text(source.read_text().replace(old, new))
        command = [sys.executable, Path(__file__).name, "--only", "softcap", "float32", "odd"]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return "" if run.returncode == 1 and report in run.stdout else f"{run.stdout}{run.stderr}"


def main() -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    only, failed, start = set(parser.parse_args().only), 0, time.perf_counter()
    os.environ["RPO_KERNELS_ON_CPU"] = "1"  # ttsem takes the place of Triton's launcher
    os.environ.pop("TRITON_INTERPRET", None)
    for fault in () if only else PLANTED:
        printed = missed(fault)
        failed += printed != ""
        print(f"planted: {fault}: {'MISSED' if printed else 'found'}", printed, flush=True)
    layout = "{:<30} {:<8} {:<7} {:>8} {:>6} {:>5} {:>9} {:>5}  {}"
    columns = "case", "dtype", "address", "launches", "faults", "races", "unchecked", "error"
    print(layout.format(*columns, "launches of"))
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2, spawn) as pool:
        for name, (kernels, dtypes, _, options) in CASES.items():
            for dtype, odd in itertools.product(dtypes, (False, True)):
                row = name, str(dtype)[6:], "odd" if odd else "aligned"
                if not only <= set(" ".join(row).replace(",", "").split()):
                    continue
                call = found, name, dtype, odd
                store, ranks = str(Path(folder, " ".join(row))), range(options.get("ranks", 1))
                by_rank = [x.result() for x in [pool.submit(*call, rank, store) for rank in ranks]]
                *counts, errors, reports = zip(*by_rank)
                report, error = "".join(reports), f"{max(errors):.2f}"
                failed += report != ""
                last = f"{kernels}{report and ': FAILED'}{report}"
                print(layout.format(*row, *map(sum, counts), error, last), flush=True)
    print(f"sanitize: {failed} failed ({time.perf_counter() - start:.0f} s)")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
