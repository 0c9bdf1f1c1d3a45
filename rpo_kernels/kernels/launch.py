"""Launch settings of the row passes, and how rows are split over programs.

Tiles and warps come from `launch_table.json`, which gives the evidence for each of its rows. A
table named by the environment variable RPO_KERNELS_LAUNCH_TABLE takes precedence. Nothing is tuned
at run time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("launch_table.json")
OWN_TABLE = "RPO_KERNELS_LAUNCH_TABLE"
# Programs of a launch; each processes every MAX_PROGRAMS-th row. They fill any GPU several times,
# so that a partly filled last wave costs little.
MAX_PROGRAMS = 65_536
# Columns of a row that one program reads before it combines their sums. The parts of a row are
# always combined in the same way, whether one program reads them or several, so that a row's bits
# do not depend on its batch. Large enough for the final reduction to be cheap.
PART = 16_384
MOST_PARTS = 8
# The fewest with which a pass with softcap or entropy spills nothing in its loop on any chip; with
# 8 warps three programs fit on a multiprocessor.
MORE_REGISTERS = 80


@dataclass(frozen=True)
class LaunchSettings:
    """A row of the table.

    Attributes:
        lanes: vectors in a tile.
        vec: elements in a vector: 16 bytes of what is read (forward) or written (backward).
        num_warps: warps of a program.
        num_stages: 1, or more to load two tiles while one is processed (forward).
        max_registers: of a thread in a pass without softcap and entropy (with one MORE_REGISTERS
            at least); 0 for what the compiler likes; CUDA only.
        evidence: where the numbers come from.
    """

    lanes: int
    vec: int
    num_warps: int
    num_stages: int = 1
    max_registers: int = 0
    evidence: str = ""

    @cached_property
    def tile(self) -> int:
        return self.lanes * self.vec

    @cached_property
    def compiler(self) -> tuple[dict[str, int], dict[str, int]]:
        """Compiler options for passes with softcap or entropy, and for passes without."""
        warps = {"num_warps": self.num_warps}
        if not self.max_registers:
            return warps, warps
        more = max(MORE_REGISTERS, self.max_registers)
        return warps | {"maxnreg": more}, warps | {"maxnreg": self.max_registers}


@lru_cache
def launch_settings(op: str, V: int, element_size: int, arch: str) -> LaunchSettings:
    """Return the settings of `"forward"` or `"backward"` for rows of V elements of some bytes each.

    In the backward these are the elements of the gradient. A user's table is used if any of its
    rows match, else the package's; of the matching rows, the one for the nearest chip (the same, or
    the newest of the older ones) and then with the largest `V_at_least`.
    """
    own = os.environ.get(OWN_TABLE)
    for path in (Path(own), TABLE) if own else (TABLE,):
        rows = [
            r
            for r in _rows(path)
            if (r["op"], r["element_size"]) == (op, element_size) and r["V_at_least"] <= V
        ]
        rows = [r for r in rows if _age(arch, r["arch"]) is not None]
        if rows:
            row = min(rows, key=lambda r: (_age(arch, r["arch"]), -r["V_at_least"]))
            return LaunchSettings(
                **{f.name: row[f.name] for f in fields(LaunchSettings) if f.name in row}
            )
    raise RuntimeError(
        f"launch_settings: the kernels run on sm_80 and newer, and on AMD's gfx; got {arch!r} "
        f"({op}, {element_size} bytes, V = {V}); pass backend='torch'"
    )


def read_table(path: Path) -> list[dict]:
    """Read and check the rows of a table; a ValueError tells what is wrong in which row."""
    try:
        rows = json.loads(path.read_text())
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"got {type(rows).__name__}")
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a JSON list of launch settings in {path}; {error}") from None
    known = {f.name for f in fields(LaunchSettings)} | {"arch", "op", "element_size", "V_at_least"}
    needed = known - {"num_stages", "max_registers"}
    for row in rows:
        if not needed <= set(row) <= known:
            missing, unknown = sorted(needed - set(row)), sorted(set(row) - known)
            what = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
            raise ValueError(f"a row of {path} {what}; got {row}")
        for name in ("lanes", "num_warps"):
            if row[name] < 1 or row[name] & (row[name] - 1):
                raise ValueError(f"`{name}` must be a power of two in {path}, got {row[name]}")
        if row["vec"] * row["element_size"] != 16:
            raise ValueError(
                f"`vec` must be 16 bytes in {path}, got {row['vec']} x {row['element_size']}"
            )
        if row.get("num_stages", 1) < 1:
            raise ValueError(f"`num_stages` must be >= 1 in {path}, got {row}")
    return rows


@lru_cache
def _rows(path: Path) -> list[dict]:
    try:
        return read_table(path)
    except ValueError as error:
        raise ValueError(f"{OWN_TABLE}: {error}") from None


def _age(arch: str, listed: str) -> int | None:
    """How much older a listed chip is than `arch`; None if it is newer or of another family."""
    a, b = (re.fullmatch(r"(sm_|gfx)(\w+)", x) for x in (arch, listed))
    if not a or not b or a[1] != b[1]:
        return None
    if a[1] == "gfx":  # unordered: any is better than none
        return int(a[2] != b[2])
    age = int(a[2]) - int(b[2])
    return age if age >= 0 else None


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which x's device is the current one, which Triton launches on."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


_assumed: str | None = None


@contextlib.contextmanager
def assumed_arch(arch: str) -> Iterator[None]:
    """Context in which launches are set up for this chip, to compile for absent ones."""
    global _assumed
    before, _assumed = _assumed, arch
    try:
        yield
    finally:
        _assumed = before


def arch_of(device: torch.device) -> str:
    """Return `"sm_90"`, `"gfx942"`, ...; `"sm_90"` without a GPU."""
    return _assumed or _arch_of(device)


@lru_cache
def _arch_of(device: torch.device) -> str:
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 0 elsewhere, where programs run one after another."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 0
    )


def part_width(V: int, tile: int) -> int:
    """Return the columns of a part of a row: equally many whole tiles, except in the last part.

    The width depends on the row only, not on the batch.
    """
    parts = max(1, min(MOST_PARTS, V // PART))
    return -(-V // (parts * tile)) * tile


def splits_rows(N: int, device: torch.device) -> bool:
    """Return whether each part of a row gets a program of its own.

    It does with fewer than two rows per multiprocessor, some of which would be idle.
    """
    return N < 2 * multiprocessors(device)
