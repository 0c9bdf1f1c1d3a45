"""How row passes are launched: tiles and warps from one table, with the evidence beside each row,
and how rows are split.

``launch_table.json`` holds what the package knows; a table of your own, named by the environment
variable RPO_KERNELS_LAUNCH_TABLE, comes before it. Nothing is tuned while a program runs.
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
# Programs of a launch; each takes every MAX_PROGRAMS-th row. Several waves of any GPU, so that the
# last one is short.
MAX_PROGRAMS = 65_536
# Columns of a row that one program reads before it puts their sums together. A row's sums are put
# together part by part however many programs read it, so that its bits do not depend on the batch.
# Enough for the reduction at the end to cost little.
PART = 16_384
MOST_PARTS = 8
# The fewest with which a pass with softcap or entropy spills nothing in its loop on any chip; with
# 8 warps three programs fit on a multiprocessor.
MORE_REGISTERS = 80


@dataclass(frozen=True)
class LaunchSettings:
    """A row of the table.

    Attributes:
        lanes: vectors of a tile.
        vec: elements of a vector: 16 bytes of what is read (forward) or written (backward).
        num_warps: of a program.
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
        """Options of a launch with softcap or entropy, and of one without."""
        warps = {"num_warps": self.num_warps}
        if not self.max_registers:
            return warps, warps
        more = max(MORE_REGISTERS, self.max_registers)
        return warps | {"maxnreg": more}, warps | {"maxnreg": self.max_registers}


@lru_cache
def launch_settings(op: str, V: int, element_size: int, arch: str) -> LaunchSettings:
    """Settings of ``"forward"`` or ``"backward"`` for rows of V elements of a size in bytes
    (backward: of the gradients).

    The first row of a user's table that fits, else that of the package with the largest
    ``V_at_least`` for the nearest chip: the same, or the newest that is not newer.
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
        f"launch_settings: the kernels are made for sm_80 and newer, and AMD's gfx; got {arch!r} "
        f"({op}, {element_size} bytes, "
        f"V = {V}); pass backend='torch'"
    )


def read_table(path: Path) -> list[dict]:
    """Rows of a table, each checked; a ValueError says what is wrong with which."""
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
            wrong = sorted(needed - set(row)) or sorted(set(row) - known)
            raise ValueError(
                f"a row of {path} lacks or does not know {', '.join(wrong)}; got {row}"
            )
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
    """How much older a listed chip is; None for a newer one or another family."""
    a, b = (re.fullmatch(r"(sm_|gfx)(\w+)", x) for x in (arch, listed))
    if not a or not b or a[1] != b[1]:
        return None
    if a[1] == "gfx":  # no order among them: any is better than none
        return int(a[2] != b[2])
    age = int(a[2]) - int(b[2])
    return age if age >= 0 else None


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Within it the device of x is the current one, on which Triton launches."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


_assumed: str | None = None


@contextlib.contextmanager
def assumed_arch(arch: str) -> Iterator[None]:
    """Within it, launches are set up as on this chip: to compile kernels for chips that are not
    there.
    """
    global _assumed
    before, _assumed = _assumed, arch
    try:
        yield
    finally:
        _assumed = before


def arch_of(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``, ...; ``"sm_90"`` where there is no GPU."""
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
    """Of a GPU; 0 elsewhere, where programs run one after the other."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 0
    )


def part_width(V: int, tile: int) -> int:
    """Columns of the parts of a row: about the same in each, whole tiles but in the last.

    Depends on nothing but the row.
    """
    parts = max(1, min(MOST_PARTS, V // PART))
    return -(-V // (parts * tile)) * tile


def splits_rows(N: int, device: torch.device) -> bool:
    """Whether each part of a row gets a program of its own: with fewer than two rows per
    multiprocessor some would idle.
    """
    return N < 2 * multiprocessors(device)
