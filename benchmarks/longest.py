"""The longest pair of responses whose DPO loss, forward and backward, fits into so much memory: its
inputs, their gradients and all else that a provider holds.

    python benchmarks/longest.py [--gib 16] [--results FILE] [--budget SECONDS] [--dry-run]

Scored tokens of both responses together, found by doubling and halving, to within 1/16. Whether a
provider's numbers are right is for bench.py to say. A run that was cut short goes on with its FILE.
A dry run goes through the motions on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cases import PARTS, QWEN, TINY, Case
from measure import Step, peak_of
from providers import PROVIDERS, Provider
from results import ROOT, Results, about

DPO = next(part for part in PARTS if part.loss == "dpo")
SHORTEST, LONGEST = 256, 1 << 21  # tokens that are tried


def longest(fits: Callable[[int], bool], most: int = LONGEST) -> int:
    """Tokens; 0 if not even SHORTEST fit, `most` if these do."""
    if not fits(SHORTEST):
        return 0
    low = SHORTEST
    while low < most and fits(2 * low):
        low *= 2
    high, within = 2 * low, low // 16
    while high - low > within and low < most:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def bytes_of(case: Case, provider: Provider, device: str) -> float:
    """What a pair takes; infinite where the device has less."""
    step = Step(case, provider, [case.inputs(device)])
    step.prepare()
    try:
        step()  # loads code, and gets cuBLAS its workspace
        return case.input_bytes + peak_of(step, device)
    except torch.OutOfMemoryError:
        return float("inf")
    finally:
        del step
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def measure(
    case: Case, provider: Provider, device: str, gib: float, most: int, ends: float
) -> dict[str, object]:
    """A provider's row, without its name; `case`: of pairs of any length."""

    def fits(tokens: int) -> bool:
        if time.monotonic() > ends:
            raise TimeoutError
        pair = Case.of_pairs(DPO, case.model, (tokens,), dtype=case.dtype)
        return bytes_of(pair, provider, device) <= gib * 2**30

    if reason := provider.missing(case, device):
        return {"status": "skipped", "reason": reason}
    try:
        return {"status": "ok", "tokens": longest(fits, most)}
    except TimeoutError:
        raise
    except Exception as error:  # of a peer: the others are still measured
        return {"status": "failed", "reason": f"{type(error).__name__}: {str(error)[:200]}"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results = ROOT / "benchmarks" / "results" / "longest.json"
    parser.add_argument("--gib", type=float, default=16, help="for the loss head (default: 16)")
    parser.add_argument("--results", type=Path, metavar="FILE", default=results)
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not args.dry_run else "cpu"
    if device == "cpu" and not args.dry_run:
        parser.error("a GPU is measured, and there is none; --dry-run goes through the motions")
    model, gib, most = (TINY, 2**-8, 512) if args.dry_run else (QWEN, args.gib, LONGEST)
    dtype = torch.float32 if args.dry_run else torch.bfloat16
    case = Case.of_pairs(DPO, model, (SHORTEST,), dtype=dtype)
    ends = time.monotonic() + args.budget
    found = Results(
        args.results,
        about(device, "dry run" if args.dry_run else "full"),
        ("provider", "model", "gib"),
    )
    # who compiles for each length comes last, and in a dry run not at all
    for provider in sorted(PROVIDERS, key=lambda x: x.compiles):
        if args.dry_run and provider.compiles:
            break
        row = {"provider": provider.name, "model": model.name, "gib": gib}
        old = found.find(**row)
        if old is None or old["status"] == "skipped":  # what was not installed may be by now
            try:
                found.put(row | measure(case, provider, device, gib, most, ends))
            except TimeoutError:
                print("the time budget is spent")
                break
    lines = [f"| provider | tokens of a pair in {gib:g} GiB, {model.name} |", "|---|---|"]
    lines += [
        f"| {row['provider']} | {row.get('tokens', row.get('reason'))} |"
        for row in found.rows
        if row["gib"] == gib
    ]
    args.results.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
