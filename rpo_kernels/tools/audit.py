"""Compile every kernel for real chips, without a GPU, and read its cost from the machine code.

Columns: registers and stack (spills) per thread and shared memory per program. For kernels that
stream rows, also the widest access to global memory, in bytes per thread, of the loop that streams
most; exponentials and instructions per element of that loop; and the rate that this arithmetic
allows, as a multiple of the memory bandwidth in the data sheet ("1.9 issue": issue slots suffice
for 1.9 times the bandwidth; "0.8 special": the unit for exponentials and reciprocals limits the
kernel to 80 % of it).

Fails (exit code 1) if a kernel that streams rows of the vocabulary spills registers in that loop
(more than four around it), or moves single elements in it.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from ..kernels.launch import assumed_arch
from .chips import CHIPS, Chip
from .disassembly import Loop
from .needs import positive, require
from .offline import Launch, MachineCode
from .table import show
from .variants import Variant, variants

COLUMNS = {
    "target": "target",
    "kernel": "kernel",
    "variant": "variant",
    "registers": "regs",
    "local_bytes": "stack",
    "shared_bytes": "shared",
    "load": "load",
    "store": "store",
    "exponentials": "exp/el",
    "instructions": "instr/el",
    "allows": "allows x bandwidth",
    "verdict": "verdict",
}
# one program: ptxas keeps up to 34 of its registers in local memory, which costs nothing there
GROUP_PASS_BYTES = 144
# of kernels that stream: what ptxas may keep there around the loop, moved once per part of a row
AROUND_BYTES = 16


@dataclass(frozen=True)
class Inner:
    """The loop that streams most.

    Attributes:
        elements: elements that a thread processes per iteration.
        exponentials: exponentials per element.
        special: instructions of the special function unit per element.
        instructions: issued instructions per element.
        bytes: bytes per element, read and written.
    """

    elements: float
    exponentials: float
    special: float
    instructions: float
    bytes: float


def streaming_loop(code: MachineCode) -> Loop:
    """Return the innermost loop that streams most.

    It is the one whose narrowest load is the widest; then the one that loads most; then the
    longest. Other loops handle edges of rows and rare cases; of loops for different alignments of a
    row the longest counts.
    """
    return max(
        code.loops,
        key=lambda x: (x.innermost, x.narrowest("load"), x.moved("load"), x.issued),
        default=Loop(()),
    )


def inner_loop(code: MachineCode, element_size: int) -> Inner | None:
    """Return the figures of the streaming loop; None if no loop loads anything."""
    loop = streaming_loop(code)
    if not loop.moved("load"):
        return None
    n = loop.moved("load") / element_size
    moved = element_size + loop.moved("store") / n
    return Inner(n, loop.exponentials / n, loop.special / n, loop.issued / n, moved)


def audited(target: str, variant: Variant, launch: Launch, **options: Any) -> dict[str, Any]:
    """Compile a launch for a chip, and return its row of the table."""
    from triton.backends.compiler import GPUTarget

    chip = CHIPS[target]
    code = launch.compile(GPUTarget(*chip.target), **options)
    row = {
        "target": target,
        "kernel": launch.kernel.__name__.strip("_").removesuffix("_kernel"),
        "variant": variant.name,
        "registers": code.registers,
        "local_bytes": code.local_bytes,
        "shared_bytes": code.shared_bytes,
    }
    streams = variant.streams(launch)
    if streams:
        loop = streaming_loop(code)
        for kind in ("load", "store"):
            row[kind] = loop.widest(kind)
        if inner := inner_loop(code, variant.dtype.itemsize):
            row |= _throughput(chip, inner)
    return row | {"verdict": _verdict(code, variant, streams)}


def _throughput(chip: Chip, inner: Inner) -> dict[str, Any]:
    rate, limit = chip.elements_of_arithmetic(inner.instructions, inner.special)
    ratio = rate / chip.elements_of_bandwidth(inner.bytes)
    return {
        "elements": inner.elements,
        "exponentials": round(inner.exponentials, 3),
        "special": round(inner.special, 3),
        "instructions": round(inner.instructions, 2),
        "bandwidth_ratio": round(ratio, 3),
        "limit": limit,
        "allows": f"{ratio:.2f} {limit}",
    }


def _verdict(code: MachineCode, variant: Variant, streams: bool) -> str:
    if not streams:
        return "ok" if code.local_bytes <= GROUP_PASS_BYTES else "spills, tolerated in one program"
    spills = streaming_loop(code).spills or code.local_bytes > AROUND_BYTES
    faults = ["spills"] if spills else []
    widths = {kind: streaming_loop(code).widest(kind) for kind in ("load", "store")}
    single = sorted(
        kind for kind, width in widths.items() if width and width <= variant.dtype.itemsize
    )
    if single:
        faults.append(f"scalar {' and '.join(f'{kind}s' for kind in single)}")
    return f"FAIL: {', '.join(faults)}" if faults else "ok"


def _job(job: tuple[str, int, int, bool]) -> dict[str, Any]:
    """Audit one launch; it is recorded again in each process, because kernels cannot be pickled."""
    target, variant, launch, full = job
    chosen = list(variants(full))[variant]
    with assumed_arch(target):
        return audited(target, chosen, chosen.launches()[launch])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target", action="append", choices=CHIPS, help="a chip; may be repeated (default: all)"
    )
    parser.add_argument(
        "--kernel",
        default="",
        metavar="NAME",
        help="only kernels with this in their name, such as forward",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="every dtype, option and alignment, not the common and extreme",
    )
    parser.add_argument(
        "--jobs",
        type=positive,
        default=os.cpu_count(),
        help="processes that compile (default: %(default)s)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the rows as JSON, with more figures"
    )


def run(args: argparse.Namespace) -> int:
    require("audit", "triton")
    # before kernels are imported, which read it
    os.environ.pop("TRITON_INTERPRET", None)
    names: dict[tuple[int, int], str] = {}  # of each launch
    for i, variant in enumerate(variants(args.full)):
        names |= {(i, j): launch.kernel.__name__ for j, launch in enumerate(variant.launches())}
    wanted = [place for place, name in names.items() if args.kernel in name]
    if not wanted:
        print(
            f"audit: no kernel has {args.kernel!r} in its name; there are "
            f"{', '.join(sorted(set(names.values())))}",
            file=sys.stderr,
        )
        return 2
    jobs = [(target, *place, args.full) for target in args.target or CHIPS for place in wanted]
    print(
        f"audit: compiling {len(jobs)} kernels for {', '.join(args.target or CHIPS)}",
        file=sys.stderr,
    )
    with ProcessPoolExecutor(min(args.jobs, len(jobs)), mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(_job, jobs))
    print(show(rows, COLUMNS, "json" if args.json else "text"))
    failed = [row for row in rows if row["verdict"].startswith("FAIL")]
    print(f"audit: {len(rows)} kernels, {len(failed)} fail", file=sys.stderr)
    return 1 if failed else 0
