"""Kernels compiled without a GPU: the machine code of a launch on a given chip, and its cost.

    with recorded_launches() as launches:
        vocabulary_forward(logits, labels, ...)  # on the meta device, too: nothing runs
    code = launches[0].compile(GPUTarget("cuda", 90, 32))
    print(code.registers, code.local_bytes, code.loop_accesses, code.loops[0].exponentials)

Requires triton, and a process in which the kernels were not decorated for its interpreter.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest import mock

import torch

from .disassembly import Loop, loops


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel.

    Attributes:
        asm: output of each stage of the compiler (`"ttgir"`, `"ptx"`, `"amdgcn"`, ...).
        registers: 32-bit registers per thread.
        local_bytes: local memory per thread (spills, stack).
        shared_bytes: shared memory per program.
    """

    asm: Mapping[str, Any]  # str; "cubin": bytes
    registers: int
    local_bytes: int
    shared_bytes: int

    @cached_property
    def instructions(self) -> str:
        """The instructions of the chip as text: SASS or GCN assembly."""
        if "amdgcn" in self.asm:
            return self.asm["amdgcn"]
        return _nvidia_tool("nvdisasm", self.asm["cubin"], "-c")

    @cached_property
    def loops(self) -> list[Loop]:
        return loops(self.instructions)

    @property
    def loop_accesses(self) -> Counter[tuple[str, int]]:
        """Accesses to global memory inside loops, by (`"load"` or `"store"`, bytes per thread)."""
        return sum((loop.accesses for loop in self.loops), Counter())


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel, with its arguments by name."""

    kernel: Any
    arguments: Mapping[str, Any]
    num_warps: int
    options: Mapping[str, Any]

    def compile(self, target: Any, **options: Any) -> MachineCode:
        """Compile the launch; see `compile_kernel`."""
        return compile_kernel(
            self.kernel, self.arguments, target, self.num_warps, **{**self.options, **options}
        )


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Context that yields a list, to which launches are appended instead of being run."""
    triton = _triton()
    launches: list[Launch] = []

    def record(
        kernel: Any,
        *args: Any,
        grid: Any,
        warmup: bool = False,
        num_warps: int = 4,
        **kwargs: Any,
    ) -> None:
        names = [p.name for p in kernel.params]
        options = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
        launches.append(Launch(kernel, dict(zip(names, args)) | kwargs, num_warps, options))

    with mock.patch.object(triton.JITFunction, "run", record):
        yield launches


def compile_kernel(
    kernel: Any, arguments: Mapping[str, Any], target: Any, num_warps: int, **options: Any
) -> MachineCode:
    """Compile a `@triton.jit` function for a chip, as a launch with these arguments would.

    Args:
        kernel: the function, not decorated for the interpreter.
        arguments: all arguments by name. Tensors are specialised by dtype and alignment, None and
            constexprs by value, integers as by Triton's launcher: divisible by 16, equal to 1,
            beyond 32 bits.
        target: `triton.backends.compiler.GPUTarget`: `("cuda", 90, 32)`, `("hip", "gfx942", 64)`,
            ...
        num_warps: warps of a program.
        options: further options of the compiler, such as `maxnreg`.

    Returns:
        The compiled kernel.

    Raises:
        RuntimeError: without triton, or for a kernel decorated for its interpreter.
    """
    triton = _triton()
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            f"compile_kernel: {kernel.__name__!r} is interpreted here; start a process without "
            "TRITON_INTERPRET=1"
        )
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(kernel.params):
        kind, constant, aligned = _specialise(param, arguments[param.name])
        signature[param.name] = kind
        if kind == "constexpr":
            constants[(i,)] = constant
        elif aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps, **options})
    asm, shared = compiled.asm, compiled.metadata.shared
    if target.backend == "hip":
        read = lambda field: _number(rf"\.{field}:\s+(\d+)", asm["amdgcn"])
        local = max(read("private_segment_fixed_size"), 4 * read("vgpr_spill_count"))
        return MachineCode(asm, read("vgpr_count"), local, shared)
    usage = _nvidia_tool("cuobjdump", asm["cubin"], "-res-usage")
    registers, stack, local = (
        _number(rf"\b{field}:(\d+)", usage) for field in ("REG", "STACK", "LOCAL")
    )
    return MachineCode(asm, registers, stack + local, shared)


def _number(pattern: str, text: str) -> int:
    """Return the only number that the pattern's group matches."""
    return int(re.findall(pattern, text)[0])


def _nvidia_tool(name: str, cubin: bytes, option: str) -> str:
    """Return the output of a tool from triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = getattr(_triton().knobs.nvidia, name).path
        return subprocess.run(
            [tool, option, file.name], capture_output=True, text=True, check=True
        ).stdout


def _triton() -> Any:
    try:
        import triton.compiler
    except ImportError:
        raise RuntimeError("compile_kernel: the package triton is not installed") from None
    return triton


_DTYPES = {"float": "fp", "bfloat": "bf", "int": "i", "uint": "u"}


def _specialise(param: Any, value: Any) -> tuple[str, Any, bool]:
    """Return (type, value if constant, whether a multiple of 16), as the launcher would."""
    if param.is_constexpr or value is None:
        return "constexpr", value, False
    if isinstance(value, torch.Tensor):
        ((family, bits),) = re.findall(r"^torch\.([a-z]+)(\d+)$", str(value.dtype))
        aligned = value.data_ptr() % 16 == 0 and not param.do_not_specialize_on_alignment
        return f"*{_DTYPES[family]}{bits}", None, aligned
    if isinstance(value, float):
        return "fp32", None, False
    if value == 1 and not param.do_not_specialize:
        return "constexpr", 1, False
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return kind, None, value % 16 == 0 and not param.do_not_specialize
