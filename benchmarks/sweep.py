"""Which launch settings are fastest on this GPU, for the row passes and for the chunks of the linear path.

    python benchmarks/sweep.py [--results FILE] [--write FILE] [--budget SECONDS] [--only rows|chunks] [--dry-run]

Each candidate is checked against float64 before it is timed. The winners of the row passes go into
``rpo_kernels/kernels/launch_table.json``, one row for each chip, kernel and element size from a vocabulary on, with what it was
measured at; rows of other chips stay. Every timing goes into the results file. A dry run goes through all of it in Triton's
interpreter, at sizes that mean nothing, and writes no table unless ``--write`` names one.
"""

from __future__ import annotations

import os
import sys

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any import of one

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar
from unittest import mock

import torch
from cases import PARTS, QWEN, SEQUENCES, TINY, Case
from measure import Ceilings, Step, check, flush_cache, peak_bytes, seconds
from providers import Ours
from results import ROOT, about
from truth import truth_of

from rpo_kernels import reference
from rpo_kernels.ops import head

TABLE = ROOT / "rpo_kernels" / "kernels" / "launch_table.json"
LOGITS_BYTES = 2 << 30  # of one launch: several times any cache
WITHIN = 0.01  # of the fastest, an earlier candidate is preferred
SMALL_V = 4096  # rows below it keep what the table says
WARPS, VECTORS = (8, 4, 16), (2, 1, 4)
STAGES = {"forward": (2, 1), "backward": (1,)}
REGISTERS = {"forward": (64, 0), "backward": (0,)}
CHUNK_ROWS, WORKSPACES = (1024, 512, 2048, 4096), (1 << 30, 1 << 29, 1 << 31, 1 << 32)


TUNED = ("lanes", "vec", "num_warps", "num_stages", "polynomial", "max_registers")


def candidates(op: str, element_size: int, arch: str) -> list[dict[str, int]]:
    """Lanes of one 16-byte vector; each thread owns some of them. Exponentials bind from Blackwell's bandwidth on, not before."""
    vec = 16 // element_size
    polynomials = (2, 0) if op == "forward" and element_size == 2 and arch.startswith("sm_10") else (0,)
    return [
        dict(zip(TUNED, (32 * warps * vectors, vec, warps, stages, polynomial, registers)))
        for warps, vectors, stages, polynomial, registers in itertools.product(
            WARPS, VECTORS, STAGES[op], polynomials, REGISTERS[op]
        )
    ]


@contextlib.contextmanager
def launching_with(settings: dict[str, int]) -> Iterator[None]:
    """Row passes launched with these settings, whatever their table says. The one place that knows how kernels take them."""
    from rpo_kernels.kernels import vocabulary
    from rpo_kernels.kernels.launch import LaunchSettings

    answer = LaunchSettings(**settings)
    with mock.patch.object(vocabulary, "launch_settings", lambda *_, **__: answer):
        yield


class RowPass:
    """The forward and the backward kernel over ``[N, V]`` logits, with their float64 results in some rows."""

    options: ClassVar = {"temperature": 1.0, "logit_scale": 1.0, "softcap": 0.0, "ignore_index": -100}

    def __init__(self, N: int, V: int, dtype: torch.dtype, device: str):
        self.N, self.V, self.device = N, V, device
        torch.manual_seed(0)
        self.logits = torch.randn(1, N, V, dtype=dtype, device=device).mul_(2.5)
        self.labels = torch.randint(0, V, (N,), device=device)
        self.coef = torch.randn(N, device=device)
        self.out = torch.empty_like(self.logits)
        rows = torch.linspace(0, N - 1, min(N, 16), device=device).round().long().unique()
        z = self.logits[0, rows].double()
        self.rows, self.logps = rows, reference.token_logps(z, self.labels[rows])
        onehot = torch.nn.functional.one_hot(self.labels[rows], V)
        self.dlogits = self.coef[rows, None] * (onehot - z.softmax(-1))

    def forward(self) -> None:
        from rpo_kernels.kernels.vocabulary import vocabulary_forward

        self.saved = vocabulary_forward(self.logits, self.labels, entropy=False, **self.options)

    def backward(self) -> None:
        from rpo_kernels.kernels.vocabulary import vocabulary_backward

        logps, lse, _ = self.saved
        vocabulary_backward(self.logits, self.labels, logps, lse, self.coef, entropies=None, entropy_coef=None, upstream=None,
                            out=self.out, **self.options)  # fmt: skip

    def bytes(self, op: str) -> int:
        return self.logits.nbytes * (1 if op == "forward" else 2)

    def error(self, op: str) -> float:
        """Relative to what the arithmetic allows: above 1 is wrong."""
        if op == "forward":
            return float((self.saved[0][self.rows] - self.logps).abs().max()) / 1e-4
        half = torch.finfo(self.out.dtype).eps  # a truncating store, as in the interpreter, errs by a whole unit
        allowed = (half + 1e-4) * self.dlogits.abs() + 1e-6
        return float(((self.out[0, self.rows].double() - self.dlogits).abs() / allowed).max())


def time_row_pass(work: RowPass, op: str, settings: dict[str, int], rounds: int) -> dict:
    """One candidate: its median and rate, or what is wrong with it."""
    step = getattr(work, op)
    try:
        with launching_with(settings):
            work.out.fill_(float("nan"))
            if op == "forward":
                work.saved = None
            step()
            error = work.error(op)
            if not error <= 1:
                return {**settings, "status": "wrong", "error": error}
            times = seconds(step, lambda: flush_cache(torch.device(work.device)), work.device, rounds)
    except Exception as error:  # too many registers, too much shared memory: no candidate then
        if "CUDA error" in str(error):
            raise
        return {**settings, "status": "failed", "error": f"{type(error).__name__}: {str(error)[:120]}"}
    median = statistics.median(times)
    return {**settings, "status": "ok", "median_s": median, "bytes_per_s": work.bytes(op) / median}


def winner(timed: list[dict]) -> dict | None:
    """The first candidate that is as good as the fastest."""
    done = [row for row in timed if row["status"] == "ok"]
    best = min((row["median_s"] for row in done), default=0)
    return next((row for row in done if row["median_s"] <= (1 + WITHIN) * best), None)


def table_rows(arch: str, op: str, element_size: int, winners: dict[int, tuple[dict, str]]) -> list[dict]:
    """Rows of the table from winners by vocabulary; a larger one with the same settings needs no row."""
    rows: list[dict] = []
    for V, (settings, evidence) in sorted(winners.items()):
        chosen = {key: settings[key] for key in TUNED}
        if not rows or any(rows[-1][key] != value for key, value in chosen.items()):
            least = V if rows else SMALL_V
            rows.append({"arch": arch, "op": op, "element_size": element_size, "V_at_least": least, **chosen, "evidence": evidence})
    return rows


def write_table(path: Path, rows: list[dict]) -> None:
    """Replace what the table says of the same chip, kernel and element size, but for small vocabularies."""
    key = lambda row: (row["arch"], row["op"], row["element_size"])
    new = set(map(key, rows))
    old = json.loads(path.read_text()) if path.exists() else []
    kept = [row for row in old if key(row) not in new or row["V_at_least"] < SMALL_V]
    lines = sorted((*kept, *rows), key=lambda row: (*key(row), row["V_at_least"]))
    path.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in lines) + "\n]\n")


def sweep_rows(sizes: dict, device: str, arch: str, name: str, copy_rate: float, ends: float) -> tuple[list[dict], list[dict]]:
    """(every timing, rows of the table)."""
    timings, rows = [], []
    for dtype in (torch.bfloat16, torch.float32):
        winners: dict[str, dict[int, tuple[dict, str]]] = {"forward": {}, "backward": {}}
        for V in sizes["V"]:
            N = max(1, min(sizes["N"], LOGITS_BYTES // (V * dtype.itemsize)))
            work = RowPass(N, V, dtype, device)
            for op in winners:
                timed = []
                for settings in sizes["candidates"](op, dtype.itemsize, arch):
                    if time.monotonic() > ends:
                        print("the time budget is spent")
                        break
                    timed.append(time_row_pass(work, op, settings, sizes["rounds"]))
                else:
                    best = winner(timed)
                    if best is not None:
                        rate = f"{best['bytes_per_s'] / 1e12:.3g} TB/s, {best['bytes_per_s'] / copy_rate:.0%} of copy"
                        winners[op][V] = best, f"{name}: {rate} at N {N}, V {V}"
                        print(f"{op} {str(dtype)[6:]} {winners[op][V][1]} with { ({k: best[k] for k in settings}) }")
                if op == "forward":
                    work.forward()  # with the kernels' own settings, for the backward
                timings += [{"op": op, "dtype": str(dtype)[6:], "N": N, "V": V, **row} for row in timed]
        for op, by_vocabulary in winners.items():
            rows += table_rows(arch, op, dtype.itemsize, by_vocabulary)
    return timings, rows


def sweep_chunks(sizes: dict, device: str, ceilings: Ceilings, ends: float) -> list[dict]:
    """Time and memory of the pair loss by rows of a chunk of logits and by workspace; ``GPU_CHUNK_ROWS`` of ops/head.py."""
    case = Case(next(part for part in PARTS if part.group_size == 2), *sizes["case"])
    inputs, limit = [case.inputs(device)], ceilings.limit(case)[0]
    truth, timings = truth_of(case, inputs[0]), []
    constant = "GPU_CHUNK_ROWS" if device == "cuda" else "CPU_CHUNK_ROWS"
    for chunk, workspace in sizes["chunks"]:
        if time.monotonic() > ends:
            print("the time budget is spent")
            break
        provider = Ours()
        provider.options = {"workspace_bytes": workspace}
        with mock.patch.object(head, constant, chunk):
            step = Step(case, provider, inputs)
            row = {"case": case.id, "chunk_rows": chunk, "workspace_bytes": workspace}
            if verdict := check(step, truth).verdict:
                timings.append({**row, "status": "wrong", "error": verdict})
                continue
            seconds(step, step.prepare, device, 2)
            median = statistics.median(seconds(step, step.prepare, device, sizes["rounds"]))
            row |= {"status": "ok", "median_s": median, "peak_bytes": peak_bytes(step, device), "limit_s": limit}
            timings.append(row)
        print(f"chunks of {chunk} rows, workspace {workspace >> 20} MiB: {median / limit:.2f} x its bare GEMMs")
    return timings


FULL = {
    "V": sorted({49_152, 128_256, 151_936, 262_144}), "N": 8192, "rounds": 15, "candidates": candidates,
    "case": (QWEN, 8192), "chunks": [(1024, w) for w in WORKSPACES] + [(c, 1 << 30) for c in CHUNK_ROWS[1:]],
}  # fmt: skip
DRY = {
    "V": [50, 300], "N": 2, "rounds": 1, "candidates": lambda *a: candidates(*a)[:3],
    "case": (TINY, 4 * SEQUENCES), "chunks": [(8, 1 << 20), (16, 1 << 20)],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, metavar="FILE", default=ROOT / "benchmarks" / "results" / "sweep.json")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"instead of {TABLE.relative_to(ROOT)}")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin no candidate after this")
    parser.add_argument("--only", choices=("rows", "chunks"))
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not args.dry_run else "cpu"
    if device == "cpu" and not args.dry_run:
        parser.error("settings are swept on a GPU, and there is none; --dry-run goes through the motions")
    ends, sizes = time.monotonic() + args.budget, DRY if args.dry_run else FULL
    ceilings = Ceilings(device)
    facts = about(device, "dry run" if args.dry_run else "full", copy_rate=ceilings.copy_rate)
    arch = arch_of(device)
    found = {"about": facts, "rows": [], "chunks": [], "table": []}
    write = args.write or (None if args.dry_run else TABLE)

    def save() -> None:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        lists = [f' "{k}": [\n  ' + ",\n  ".join(map(json.dumps, v)) + "\n ]" for k, v in found.items() if k != "about"]
        args.results.write_text(f'{{\n "about": {json.dumps(facts, indent=1)},\n' + ",\n".join(lists) + "\n}\n")

    if args.only != "chunks":
        name = f"{facts['device']}, commit {facts['commit']}"
        found["rows"], found["table"] = sweep_rows(sizes, device, arch, name, ceilings.copy_rate, ends)
        save()
        if write is not None and found["table"]:
            write_table(write, found["table"])
            print(f"{len(found['table'])} rows of {arch} written to {write}")
    if args.only != "rows":
        found["chunks"] = sweep_chunks(sizes, device, ceilings, ends)
        save()


def arch_of(device: str) -> str:
    """As kernels know their chip: sm_90, gfx942, ...; "interpreter" where there is none."""
    if device != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


if __name__ == "__main__":
    main()
