"""Figures of chips, for the audit.

Limits of arithmetic are per multiprocessor (compute unit) and cycle.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """A chip and its limits.

    Attributes:
        name: the product that the figures describe.
        target: arguments of triton's `GPUTarget`: backend, architecture, threads of a warp.
        multiprocessors: number in the product.
        clock: boost clock in Hz, from the data sheet.
        bandwidth: memory bandwidth in bytes/s, from the data sheet.
        lanes: thread instructions issued. NVIDIA: four warp schedulers. AMD: four SIMDs of 16
            lanes.
        special: exponentials, reciprocals and the like.
        special_apart: whether their unit works in parallel with the issue of others (NVIDIA), or
            occupies its SIMD (AMD: a quarter of the rate).
    """

    name: str
    target: tuple[str, int | str, int]
    multiprocessors: int
    clock: float
    bandwidth: float
    lanes: int = 128
    special: int = 16
    special_apart: bool = True

    def elements_of_bandwidth(self, bytes_per_element: float) -> float:
        """Return the elements that the memory moves per multiprocessor and cycle."""
        return self.bandwidth / (self.multiprocessors * self.clock * bytes_per_element)

    def elements_of_arithmetic(self, issued: float, special: float) -> tuple[float, str]:
        """Return the elements that the instructions allow, and the limit: `"issue"` or `"special"`.

        Narrower pipes (integers and comparisons at half rate) are not modelled: this is an upper
        bound.
        """
        if self.special_apart:
            cycles = {"issue": issued / self.lanes, "special": special / self.special}
        else:
            cycles = {"issue": (issued - special) / self.lanes + special / self.special}
        limit = max(cycles, key=cycles.__getitem__)
        return 1 / cycles[limit], limit


# Multiprocessors, clock and bandwidth are from NVIDIA's A100, H100 and RTX Blackwell architecture
# papers and data sheets, and AMD's MI300X data sheet. In fp32:
#     A100 SXM   19.5 TFLOP/s = 108 x 64 x 2 x 1.41 GHz
#     H100 SXM   67 TFLOP/s = 132 x 128 x 2 x 1.98 GHz
#     HGX B200   75 TFLOP/s = 148 x 128 x 2 x 1.98 GHz
# Special functions: 16 per cycle for 8.0 to 12.0 (CUDA programming guide, table of arithmetic
# throughput); a quarter of 64 on CDNA3.
CHIPS = {
    "sm_80": Chip("A100 SXM", ("cuda", 80, 32), 108, 1.41e9, 2.039e12),
    "sm_90": Chip("H100 SXM", ("cuda", 90, 32), 132, 1.98e9, 3.35e12),
    "sm_100": Chip("B200", ("cuda", 100, 32), 148, 1.98e9, 8.0e12),
    "sm_120": Chip("RTX 5090", ("cuda", 120, 32), 170, 2.41e9, 1.792e12),
    "gfx942": Chip(
        "MI300X", ("hip", "gfx942", 64), 304, 2.1e9, 5.3e12, lanes=64, special_apart=False
    ),
}
