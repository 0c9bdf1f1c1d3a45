"""Time of the linear path on a CPU against another commit of this repository, in pairs.

    python benchmarks/against.py COMMIT [--rounds 15] [--threads 1] [--json FILE]

The versions run in two processes, which take turns, so that a busy machine slows both. A round is
one forward and backward of each, in processor seconds. The figures are medians over the rounds; the
ratio is the median of the rounds' ratios, with its quartiles.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
H, V = 576, 16_384  # SmolLM2-135M, a third of its vocabulary
# (groups, responses, tokens per response, whether the head is trained, workspace in rows of fp32)
CASES = {
    "frozen, one group of 4 workspaces": (1, 8, 128, False, 256),
    "frozen, small groups": (16, 4, 16, False, 512),
    "trainable, small groups": (16, 4, 16, True, 512),
    "trainable, one group of 4 workspaces": (1, 8, 128, True, 256),
}


def step_of(case: str):
    """Return a function that runs forward and backward of one case."""
    import torch

    from rpo_kernels import RPOObjective, linear_rpo_loss

    groups, K, T, trained, rows = CASES[case]
    torch.manual_seed(0)
    hidden = torch.randn(groups * K, T, H).requires_grad_()
    weight = (torch.randn(V, H) * H**-0.5).requires_grad_(trained)
    labels = torch.randint(0, V, (groups * K, T))
    rewards, ref_logps = torch.randn(groups * K), torch.full((groups * K,), -9.0 * T)

    def step() -> None:
        loss = linear_rpo_loss(
            hidden,
            weight,
            labels,
            rewards,
            RPOObjective("backward_kl", 0.1),
            ref_logps=ref_logps,
            group_size=K,
            workspace_bytes=rows * 4 * V,
        ).loss
        loss.backward()
        hidden.grad = weight.grad = None

    return step


def serve(threads: int) -> None:
    """Time the cases whose names arrive line by line on standard input."""
    import torch

    torch.set_num_threads(threads)
    steps = {case: step_of(case) for case in CASES}
    for line in sys.stdin:
        start = time.process_time()
        steps[line.strip()]()
        print(time.process_time() - start, flush=True)


class Version:
    """A process that runs the package in one folder."""

    def __init__(self, folder: Path, threads: int):
        environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", "--threads", str(threads)],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, case: str) -> float:
        print(case, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"against.py: the process of {self.process.args} has ended")
        return float(line)


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commit", nargs="?", help="the version to compare with")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.threads)
    if options.commit is None or options.rounds < 1:
        parser.error("expected a commit, and at least one round")
    commit = git("rev-parse", "--verify", f"{options.commit}^{{commit}}").decode().strip()
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(git("archive", commit, "rpo_kernels"))) as archive:
            archive.extractall(folder, filter="data")
        now, before = (Version(Path(x), options.threads) for x in (ROOT, folder))
        rows = [measure(case, now, before, options.rounds) for case in CASES]
        for version in (now, before):
            version.process.stdin.close()
            version.process.wait()
    for row in rows:
        low, high = row["ratio quartiles"]
        print(
            f"{row['case']:40} {row['before']:.3f} s -> {row['now']:.3f} s, "
            f"ratio {row['ratio']:.2f} ({low:.2f} to {high:.2f})"
        )
    if options.json:
        from cpu import processor

        about = {
            "command": "python " + " ".join([f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
            "commit": git("describe", "--always", "--dirty", "--abbrev=12").decode().strip(),
            "against": commit[:12],
            "device": processor(),
            "threads": options.threads,
            "rounds": options.rounds,
        }
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def measure(case: str, now: Version, before: Version, rounds: int) -> dict:
    for version in (now, before):
        version.seconds(case)  # loads code
    pairs = []
    for i in range(rounds):
        first, second = (now, before) if i % 2 else (before, now)
        times = {first: first.seconds(case), second: second.seconds(case)}
        pairs.append((times[now], times[before]))
    ratios = sorted(a / b for a, b in pairs)
    quartiles = statistics.quantiles(ratios, n=4)[::2] if rounds > 1 else ratios * 2
    return {
        "case": case,
        "now": statistics.median(a for a, _ in pairs),
        "before": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio quartiles": quartiles,
    }


if __name__ == "__main__":
    main()
