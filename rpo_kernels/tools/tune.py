"""Choose launch settings of the row passes for your vocabularies, and write them to a table.

    # on a GPU, by timing
    python -m rpo_kernels tune --vocab 151936 --dtype bfloat16 --output table.json
    # without a GPU, by machine code
    python -m rpo_kernels tune --vocab 151936 --dtype bfloat16 --output table.json --audit sm_100
    RPO_KERNELS_LAUNCH_TABLE=table.json python train.py

On a GPU each candidate is checked against float64, then timed with a cold cache; the fastest is
chosen, or the first of equally fast ones. With --audit it is the first candidate that does not
spill, accesses memory 16 bytes at a time, and whose arithmetic allows 1.15 times the bandwidth; the
rows of the package's table whose evidence says so were made in this way. Each row contains its
evidence. Rows of FILE for other chips, passes, dtypes and sizes are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from .. import __version__, reference
from ..inputs import LogitTransform
from ..kernels.launch import LaunchSettings, arch_of, assumed_arch, read_table
from .chips import CHIPS
from .needs import positive, require
from .table import show
from .timing import flush_cache, is_device_lost, seconds

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OPS = ("forward", "backward")
TUNED = ("lanes", "vec", "num_warps", "num_stages", "max_registers")
COLUMNS = {
    "op": "pass",
    "dtype": "dtype",
    "V": "V",
    **dict(zip(TUNED, TUNED)),
    "status": "status",
    "figure": "",
}
LOGITS_BYTES = 2 << 30  # of one launch: several times any cache
ROUNDS = 15
WITHIN = 0.01  # of the fastest time: within it an earlier candidate is preferred
ENOUGH = 1.15  # times the bandwidth: what the arithmetic must allow
SMALL_V = 4096  # below it one warp processes a row


def candidates(op: str, V: int, element_size: int, arch: str) -> Iterator[LaunchSettings]:
    """Yield settings in order of preference.

    Many threads with few registers come first, each with one vector of a tile (backward: two).
    """
    amd = arch.startswith("gfx")
    if V < SMALL_V:
        shapes = [(1, 0), (2, 0)]  # warps of a program, bound on the registers of a thread
    elif amd:
        shapes = [(4, 0), (2, 0), (8, 0)]
    elif op == "forward":
        shapes = [(8, 64), (4, 64), (4, 72), (4, 80), (4, 96), (4, 112), (16, 64), (8, 0)]
    else:
        shapes = [(8, 0), (4, 0), (16, 0)]
    stages, vectors = ((2, 1), (1, 2)) if op == "forward" else ((1,), (2, 1))
    for stage, vector, (warps, registers) in itertools.product(stages, vectors, shapes):
        lanes = (64 if amd else 32) * warps * vector
        yield LaunchSettings(lanes, 16 // element_size, warps, stage, registers)


@contextlib.contextmanager
def launching_with(settings: LaunchSettings) -> Iterator[None]:
    """Context in which row passes are launched with these settings, instead of those of a table."""
    from ..kernels import vocabulary_backward, vocabulary_forward

    given = lambda *_: settings
    with (
        mock.patch.object(vocabulary_forward, "launch_settings", given),
        mock.patch.object(vocabulary_backward, "launch_settings", given),
    ):
        yield


# ---- by timing -----------------------------------------------------------------------------------


class RowPass:
    """The forward and backward kernels over `[N, V]` logits, and float64 results of some rows."""

    def __init__(self, N: int, V: int, dtype: torch.dtype, device: str):
        self.device = device
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
        self.forward()  # with the table's settings: what the backward reads

    def forward(self) -> None:
        from ..kernels.vocabulary_forward import vocabulary_forward

        self.saved = vocabulary_forward(self.logits, self.labels, LogitTransform())

    def backward(self) -> None:
        from ..kernels.vocabulary_backward import vocabulary_backward

        logps, lse, _ = self.saved
        vocabulary_backward(
            self.logits, self.labels, logps, lse, self.coef, LogitTransform(), self.out
        )

    def bytes(self, op: str) -> int:
        return self.logits.nbytes * (1 if op == "forward" else 2)

    def error(self, op: str) -> float:
        """Return the error relative to what the arithmetic allows: above 1 is wrong."""
        if op == "forward":
            return float((self.saved[0][self.rows] - self.logps).abs().max()) / 1e-4
        # a whole ulp: stores truncate in the interpreter
        half = torch.finfo(self.out.dtype).eps
        allowed = (half + 1e-4) * self.dlogits.abs() + 1e-6
        return float(((self.out[0, self.rows].double() - self.dlogits).abs() / allowed).max())


def timed(work: RowPass, op: str, settings: LaunchSettings, rounds: int = ROUNDS) -> dict[str, Any]:
    """Time one candidate: its median, or what is wrong with it."""
    step, saved = getattr(work, op), work.saved
    try:
        with launching_with(settings):
            work.out.fill_(float("nan"))
            step()
            error = work.error(op)
            if not error <= 1:
                return {
                    "status": "wrong",
                    "figure": f"error {error:.3g} times what the arithmetic allows",
                }
            median = statistics.median(
                seconds(step, lambda: flush_cache(torch.device(work.device)), work.device, rounds)
            )
    except Exception as error:  # not a candidate: too many registers, too much shared memory
        if is_device_lost(error):
            raise
        return {"status": "failed", "figure": f"{type(error).__name__}: {str(error)[:80]}"}
    finally:
        work.saved = saved
    rate = work.bytes(op) / median
    return {
        "status": "ok",
        "figure": f"{1e3 * median:.4g} ms, {rate / 1e12:.3g} TB/s",
        "median_s": median,
        "bytes_per_s": rate,
    }


def winner(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the first candidate that is as fast as the fastest."""
    done = [row for row in rows if row["status"] == "ok"]
    best = min((row["median_s"] for row in done), default=0)
    return next((row for row in done if row["median_s"] <= (1 + WITHIN) * best), None)


def copy_rate(device: str) -> float:
    """Return the bytes per second that a copy reads and writes."""
    source, target = torch.empty(2, 1 << 28 if device == "cuda" else 1 << 16, device=device)
    prepare = lambda: flush_cache(torch.device(device))
    return (
        2
        * source.nbytes
        / statistics.median(seconds(lambda: target.copy_(source), prepare, device, 11)[3:])
    )


def by_clock(
    op: str,
    V: int,
    dtype: torch.dtype,
    device: str,
    copy: float,
    ends: float = float("inf"),
    bytes: int = LOGITS_BYTES,
    rounds: int = ROUNDS,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Return every candidate, and the winner with its evidence.

    There is no winner if a candidate would begin after the time `ends`.
    """
    N = max(1, bytes // (V * dtype.itemsize))
    work, rows = RowPass(N, V, dtype, device), []
    for settings in candidates(op, V, dtype.itemsize, arch_of(torch.device(device))):
        found = (
            timed(work, op, settings, rounds)
            if time.monotonic() < ends
            else {"status": "not timed"}
        )
        rows.append({key: getattr(settings, key) for key in TUNED} | found)
    best = winner(rows)
    if best and rows[-1]["status"] != "not timed":
        name = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
        rate = f"{best['bytes_per_s'] / 1e12:.3g} TB/s, {best['bytes_per_s'] / copy:.0%} of copy"
        return rows, best | {
            "evidence": f"{name}, rpo_kernels {__version__}: {rate} at N {N}, V {V}"
        }
    return rows, None


# ---- by machine code -----------------------------------------------------------------------------


def by_audit(
    op: str, V: int, dtype: torch.dtype, arch: str
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Return the candidates up to the winner, and the winner with its evidence."""
    from .audit import audited
    from .variants import Variant, launch_vocabulary

    variant, rows = (
        Variant(
            f"{str(dtype)[6:]}, tuned", partial(launch_vocabulary, dtype, False, False, V), dtype, V
        ),
        [],
    )
    for settings in candidates(op, V, dtype.itemsize, arch):
        with assumed_arch(arch), launching_with(settings):
            (launch,) = (x for x in variant.launches() if op in x.kernel.__name__)
        found = audited(arch, variant, launch)
        ratio, verdict = found.get("bandwidth_ratio", 0.0), found["verdict"]
        if found["local_bytes"] and verdict == "ok":
            verdict = "spills around the loop"
        status = verdict if verdict != "ok" else "ok" if ratio >= ENOUGH else "slow"
        row = {key: getattr(settings, key) for key in TUNED} | {
            "status": status,
            "figure": f"allows {ratio:.2f} x bandwidth",
        }
        rows.append(row)
        if status == "ok":
            figures = (
                f"{found['exponentials']:.3g} exponentials and {found['instructions']:.4g} "
                "instructions per element"
            )
            audit = (
                f"audit: {found['registers']} registers, no spills, {figures}, allows {ratio:.2f} "
                "x bandwidth"
            )
            return rows, row | {"evidence": f"{audit}; not measured on a GPU"}
    return rows, None


# ---- the table -----------------------------------------------------------------------------------


def table_rows(
    arch: str, op: str, element_size: int, winners: dict[int, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Make rows of the table from the winners of each vocabulary.

    The first of the small vocabularies and the first of the large ones represent their class; a
    larger one with the same settings needs no row of its own.
    """
    rows: list[dict[str, Any]] = []
    for V, best in sorted(winners.items()):
        chosen = {key: best[key] for key in TUNED}
        least = 0 if V < SMALL_V else SMALL_V
        first = not rows or rows[-1]["V_at_least"] < least
        if first or any(rows[-1][key] != value for key, value in chosen.items()):
            at = {
                "arch": arch,
                "op": op,
                "element_size": element_size,
                "V_at_least": least if first else V,
            }
            rows.append(at | chosen | {"evidence": best["evidence"]})
    return rows


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a table's rows for the same chip, pass, element size and class of vocabularies."""
    key = lambda row: (row["arch"], row["op"], row["element_size"], row["V_at_least"] >= SMALL_V)
    places = {arch: i for i, arch in enumerate(CHIPS)}
    order = lambda row: (
        places.get(row["arch"], len(places)),
        row["arch"],
        OPS.index(row["op"]),
        row["element_size"],
        row["V_at_least"],
    )
    new = set(map(key, rows))
    kept = [row for row in (read_table(path) if path.exists() else []) if key(row) not in new]
    lines = sorted((*kept, *rows), key=order)
    path.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in lines) + "\n]\n")


# ---- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vocab",
        type=positive,
        nargs="+",
        required=True,
        metavar="V",
        help="columns of a row of logits",
    )
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", required=True, help="of the logits")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the table to write or to renew"
    )
    parser.add_argument("--op", choices=OPS, nargs="+", default=OPS, help="passes (default: both)")
    parser.add_argument(
        "--audit",
        choices=CHIPS,
        metavar="CHIP",
        help=f"without a GPU, for one of {', '.join(CHIPS)}",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        metavar="S",
        help="begin no candidate after so many",
    )
    parser.add_argument("--json", action="store_true", help="print every candidate as JSON")


def _refusal(args: argparse.Namespace) -> str | None:
    """Return why nothing can be tuned, or None."""
    if not args.audit and not torch.cuda.is_available():
        return (
            "candidates are timed on a GPU, and there is none; --audit CHIP chooses by machine code"
        )
    if {"bfloat16", "float16"} <= set(args.dtype):
        return "--dtype bfloat16 float16: both are 2 bytes and share rows of the table; name one"
    if not args.output.parent.is_dir():
        return f"--output {args.output}: there is no folder {args.output.parent}"
    try:
        if args.output.exists():
            read_table(args.output)
    except ValueError as error:
        return f"--output {args.output} is there and is no table: {error}"
    return None


def run(args: argparse.Namespace) -> int:
    # before kernels are imported, which read it
    os.environ.pop("TRITON_INTERPRET", None)
    if refusal := _refusal(args):
        print(f"tune: {refusal}", file=sys.stderr)
        return 2
    require("tune", "triton")
    arch = args.audit or arch_of(torch.device("cuda"))
    ends, copy = time.monotonic() + args.seconds, 0.0 if args.audit else copy_rate("cuda")
    rows, table, without = [], [], []
    for op, dtype in itertools.product(
        dict.fromkeys(args.op), [DTYPES[name] for name in dict.fromkeys(args.dtype)]
    ):
        winners: dict[int, dict[str, Any]] = {}
        for V in sorted(set(args.vocab)):
            found, best = (
                by_audit(op, V, dtype, arch)
                if args.audit
                else by_clock(op, V, dtype, "cuda", copy, ends)
            )
            what = {"op": op, "dtype": str(dtype)[6:], "V": V}
            rows += [what | row for row in found]
            if best:
                winners[V] = best
            else:
                without.append(f"{op} {what['dtype']} V {V}")
        table += table_rows(arch, op, dtype.itemsize, winners)
        if table:  # after each pass: a run may be interrupted
            write_table(args.output, table)
    print(show(rows, COLUMNS, "json" if args.json else "text"))
    print(f"tune: {len(table)} rows of {arch} written to {args.output}", file=sys.stderr)
    if without:
        print(f"tune: no candidate serves for {'; '.join(without)}: no row", file=sys.stderr)
    return 1 if without else 0
