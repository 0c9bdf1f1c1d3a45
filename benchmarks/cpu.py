"""Time and memory of the CPU backend against naive PyTorch, each in a fresh process.

    python benchmarks/cpu.py [--threads 2] [--repeat 5] [--scale 1.0] [--json FILE] [CASE ...]

Time is the median of forward and backward over repeats, in wall seconds and in processor seconds of
all threads. Memory is the peak of the resident set above its size before the call, gradients
included. A first call, which loads code, does not count. Naive is fp32 log_softmax and gather.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

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


def steps(case: str, scale: float):
    """Return (inputs, naive step, our step)."""
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


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Peak(threading.Thread):
    """A thread that tracks the peak of the resident set."""

    def run(self) -> None:
        self.done, self.base = False, resident()
        self.peak = self.base
        while not self.done:
            self.peak = max(self.peak, resident())
            time.sleep(0.002)


def measure(case: str, provider: str, threads: int, repeat: int, scale: float) -> dict:
    torch.set_num_threads(threads)
    inputs, *both = steps(case, scale)
    step = both[PROVIDERS.index(provider)]
    walls, cpus, peaks = [], [], []
    for _ in range(repeat + 1):
        for x in inputs:
            x.grad = None
        gc.collect()
        watch = Peak()
        watch.start()
        time.sleep(0.01)
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        loss.backward()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        watch.done = True
        watch.join()
        peaks.append(watch.peak - watch.base)
    return {
        "case": case,
        "provider": provider,
        "wall_s": round(statistics.median(walls[1:]), 3),
        "cpu_s": round(statistics.median(cpus[1:]), 3),
        "peak_mb": round(statistics.median(peaks[1:]) / 2**20),
        "loss": loss.item(),
    }


def compare(cases: list[str], threads: int, repeat: int, scale: float) -> list[dict]:
    rows = []
    for case in cases:
        for provider in PROVIDERS:
            options = {
                "--one": provider,
                "--threads": threads,
                "--repeat": repeat,
                "--scale": scale,
            }
            command = [
                sys.executable,
                __file__,
                *(str(x) for option in options.items() for x in option),
                case,
            ]
            rows.append(
                json.loads(
                    subprocess.run(command, check=True, capture_output=True, text=True).stdout
                )
            )
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        "| case | naive: wall, cpu, peak | rpo_kernels | wall | cpu | memory |",
        "|---|---|---|---|---|---|",
    ]
    for naive, ours in zip(rows[::2], rows[1::2]):
        cells = [
            f"{r['wall_s']:.2f} s, {r['cpu_s']:.2f} s, {r['peak_mb']} MB" for r in (naive, ours)
        ]
        ratios = [f"{ours[key] / naive[key]:.2f} x" for key in ("wall_s", "cpu_s", "peak_mb")]
        lines.append(f"| {naive['case']} | {' | '.join(cells + ratios)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(map(repr, CASES))
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of rows")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=PROVIDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"unknown case {sorted(unknown)}; valid are {list(CASES)}")
    if args.one:
        print(json.dumps(measure(args.cases[0], args.one, args.threads, args.repeat, args.scale)))
        return
    rows = compare(args.cases, args.threads, args.repeat, args.scale)
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
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit,
            "command": " ".join(["python", "benchmarks/cpu.py", *sys.argv[1:]]),
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
