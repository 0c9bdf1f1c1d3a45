"""Time and memory of the CPU backend against naive PyTorch, in pairs.

    python benchmarks/cpu.py [--threads 2] [--rounds 5] [--scale 1.0] [--json FILE] [CASE ...]

Both take turns in a process of the case, first as the machine is ("idle"), then with another
process on each core ("busy"). Times are of forward and backward, wall seconds and processor seconds
of all threads, medians over the rounds; a ratio is the median of the rounds' ratios, with its
quartiles. Memory is the peak of the resident set above what stood before the step, gradients
included; a first step, which loads code, does not count. Naive is fp32 log_softmax and gather.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pairs
import torch

from rpo_kernels import RPOObjective, linear_rpo_loss, token_logps

# (rows, hidden size or None for the path from logits, vocabulary, dtype, share of scored rows)
CASES = {
    "logits fp32": (2048, None, 50_257, torch.float32, 1.0),
    "logits bf16": (2048, None, 50_257, torch.bfloat16, 1.0),
    "linear bf16": (4096, 576, 49_152, torch.bfloat16, 1.0),
    "linear fp32": (4096, 576, 49_152, torch.float32, 1.0),
    "linear bf16, 30 % scored": (4096, 576, 49_152, torch.bfloat16, 0.3),
}
PROVIDERS = ("naive", "rpo_kernels")


def losses(case: str, scale: float):
    """(inputs, naive loss, our loss)."""
    rows, hidden, V, dtype, share = CASES[case]
    S = 8
    T = int(rows * scale) // S
    torch.manual_seed(0)
    labels = torch.randint(0, V, (S, T))
    labels[:, int(T * share) :] = -100
    ref, rewards = -10 * torch.rand(S, T), torch.randn(S)
    objective = RPOObjective("squared", 0.1)

    def naive_logps(logits):
        logps = torch.log_softmax(logits.float(), -1).gather(-1, labels.clamp(min=0)[..., None])[
            ..., 0
        ]
        return torch.where(labels >= 0, logps, 0)

    if hidden is None:
        logits = (3 * torch.randn(S, T, V)).to(dtype).requires_grad_()
        weights = torch.randn(S, T)
        return (
            [logits],
            lambda: (naive_logps(logits) * weights).sum(),
            lambda: (token_logps(logits, labels) * weights).sum(),
        )
    h = torch.randn(S, T, hidden).to(dtype).requires_grad_()
    w = (0.05 * torch.randn(V, hidden)).to(dtype).requires_grad_()

    def naive():
        s = 0.1 * (naive_logps(h @ w.t()) - torch.where(labels >= 0, ref, 0)).sum(1)
        u = (s - rewards).view(-1, 2)
        return ((u[:, 0] - u[:, 1]) ** 2 / 2).mean()

    return (
        [h, w],
        naive,
        lambda: linear_rpo_loss(h, w, labels, rewards, objective, ref_logps=ref).loss,
    )


def processor() -> str:
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return names[0] if names else platform.processor()


def peak_bytes(step: Callable[[], object]) -> int:
    """Of the resident set above what stood before the step, which ends with its gradients."""
    # what is freed is to leave the process: else a step finds its memory in what others left
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) << 10


def compare(case: str, threads: int, rounds: int, scale: float, conditions: Sequence[str]) -> dict:
    """Times in turns under each condition, then the peaks; once in a process."""
    torch.set_num_threads(threads)
    inputs, *both = losses(case, scale)

    def step_of(loss: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def step() -> torch.Tensor:
            for x in inputs:
                x.grad = None
            value = loss()
            value.backward()
            return value.detach()

        return step

    steps = {provider: step_of(loss) for provider, loss in zip(PROVIDERS, both)}
    row = {"case": case, "loss": {name: step().item() for name, step in steps.items()}}
    for condition in conditions:
        with pairs.cores(condition):
            times = pairs.in_turns(steps, rounds)
        row[condition] = {}
        for unit in ("wall_s", "cpu_s"):
            each = {name: [x[unit] for x in times[name]] for name in PROVIDERS}
            ratios = [ours / naive for naive, ours in zip(*each.values())]
            row[condition][unit] = {
                **{name: round(statistics.median(x), 4) for name, x in each.items()},
                "ratio": pairs.spread(ratios),
            }
    for name, step in steps.items():
        for x in inputs:
            x.grad = None
        row.setdefault("peak_mb", {})[name] = round(peak_bytes(step) / 2**20)
    return row


def table(rows: list[dict]) -> str:
    lines = [
        "| case | cores | naive: wall, cpu | rpo_kernels | wall | cpu | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        naive, ours = (row["peak_mb"][name] for name in PROVIDERS)
        memory = f"{naive} MiB, {ours} MiB: {ours / naive:.2f} x"
        for condition in (x for x in pairs.CONDITIONS if x in row):
            wall, cpu = (row[condition][unit] for unit in ("wall_s", "cpu_s"))
            times = [f"{wall[name]:.2f} s, {cpu[name]:.2f} s" for name in PROVIDERS]
            ratios = [pairs.shown(x["ratio"]) for x in (wall, cpu)]
            cells = [row["case"], condition, *times, *ratios, memory]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(map(repr, CASES))
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of rows")
    parser.add_argument("--only", choices=pairs.CONDITIONS, help="one of both conditions")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"unknown case {sorted(unknown)}; valid are {list(CASES)}")
    if args.rounds < 1:
        parser.error("expected at least one round")
    load = os.getloadavg()[0]
    conditions = [args.only] if args.only else pairs.CONDITIONS
    measure = functools.partial(
        compare,
        threads=args.threads,
        rounds=args.rounds,
        scale=args.scale,
        conditions=conditions,
    )
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        rows = fresh.map(measure, args.cases, chunksize=1)
    print(table(rows))
    if args.json:
        try:
            commit = subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
            ).stdout.strip()
        except OSError:
            commit = os.environ.get("RPO_COMMIT", "")
        about = {
            "processor": processor(),
            "threads": args.threads,
            "load": round(load, 1),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit,
            "command": " ".join(["python", "benchmarks/cpu.py", *sys.argv[1:]]),
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
