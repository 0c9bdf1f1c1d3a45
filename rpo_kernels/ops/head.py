"""An lm_head whose logits exist one chunk of scored rows at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from .. import distributed, gemm
from ..backend import module_of
from ..inputs import LogitTransform

GPU_WORKSPACE = 2 << 30
CPU_WORKSPACE = 256 << 20
# Rows of a chunk of logits: enough for the GEMMs to reach their full rate. Fewer on a CPU, so that
# the row passes find them in the cache.
GPU_CHUNK_ROWS = 1024
CPU_CHUNK_ROWS = 256
# Rows of P in one dhidden GEMM with a frozen head: enough tiles for every multiprocessor.
GPU_FROZEN_ROWS = 4096


# The function that the running call shows its logits to. A context variable, because operators take
# plain types only.
OnLogits = Callable[[Tensor, Tensor, dict], None] | None
_on_logits: ContextVar[OnLogits] = ContextVar("on_logits", default=None)


def shown_to(op: str, on_logits: OnLogits) -> contextlib.AbstractContextManager:
    """Return a context in which heads show the logits they compute to `on_logits`."""
    if on_logits is None:
        return contextlib.nullcontext()
    if not callable(on_logits):
        raise TypeError(
            f"{op}: `on_logits` must be a function of (logits, labels, transform), got "
            f"{on_logits!r}"
        )
    if torch.compiler.is_compiling():
        raise ValueError(
            f"{op}: `on_logits` must be None under torch.compile, whose graph cannot contain the "
            f"call, got {on_logits!r}"
        )
    return _showing(on_logits)


@contextlib.contextmanager
def _showing(on_logits: OnLogits) -> Iterator[None]:
    token = _on_logits.set(on_logits)
    try:
        yield
    finally:
        _on_logits.reset(token)


class Options(NamedTuple):
    """How and where hidden states become logits."""

    transform: LogitTransform
    compute_dtype: torch.dtype  # of the GEMMs' inputs
    logits_dtype: torch.dtype
    workspace_bytes: int
    backend: str
    vocab_ranks: str = ""  # name of the process group that shares the vocabulary
    reduce_dhidden: bool = True  # whether dhidden is summed over these ranks


class Leaves(NamedTuple):
    """Inputs of the logits x = hidden weight^T + lora_hidden lora_weight^T + bias."""

    hidden: Tensor  # [..., H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    lora_hidden: Tensor | None  # [..., r]
    lora_weight: Tensor | None  # [V, r]

    def needs(self) -> list[bool]:
        """Return which of them require a gradient."""
        grad = torch.is_grad_enabled()
        return [grad and x is not None and x.requires_grad for x in self]


class Needs(NamedTuple):
    """Which leaves require a gradient, by name."""

    hidden: bool
    weight: bool
    bias: bool
    lora_hidden: bool
    lora_weight: bool


class Rows(NamedTuple):
    """The scored rows of a batch, gathered."""

    index: Tensor  # type: ignore[assignment]  # [n] int64, flat positions; not tuple.index
    hidden: Tensor  # [n, H] in the compute dtype
    lora_hidden: Tensor | None  # [n, r] in the compute dtype
    labels: Tensor  # [n] int64; on a shard, relative to its first column

    @property
    def size(self) -> int:
        return self.index.shape[0]


class Chunks(NamedTuple):
    """Numbers of rows that exist at a time."""

    logits: int  # rows of logits
    waiting: int  # rows of P: a multiple of `logits`, or all rows


class Head:
    """The head's weight and bias, and the vocabulary passes over chunks of its logits."""

    def __init__(
        self, op: str, leaves: Leaves, options: Options, shard: distributed.Shard | None = None
    ):
        """With a shard, `leaves` are its columns and labels are relative to the first of them."""
        self.op, self.options, self.shard = op, options, shard
        self.leaves, self.V, self.device = leaves, leaves.weight.shape[0], leaves.weight.device
        self.on_logits = _on_logits.get()
        # where both have one dtype, dlogits overwrite the logits
        self.in_place = options.logits_dtype == options.compute_dtype
        self.transform = options.transform
        choose = functools.partial(module_of, op, options.backend, self.device)
        self.vocabulary_forward = choose("vocabulary_forward").vocabulary_forward
        self.vocabulary_backward = choose("vocabulary_backward").vocabulary_backward
        if shard is not None:
            self.transform = self.transform._replace(ignore_index=distributed.IGNORED)
            self.vocabulary_forward = functools.partial(shard.forward, choose)

    @functools.cached_property
    def weights(self) -> tuple[Tensor, Tensor | None]:
        """weight and lora_weight in the GEMMs' dtype; copied only if they have another one."""
        dtype, lora_weight = self.options.compute_dtype, self.leaves.lora_weight
        return self.leaves.weight.to(dtype), None if lora_weight is None else lora_weight.to(dtype)

    @property
    def widest(self) -> int:
        """Columns of the widest shard, for plans that are the same on all ranks."""
        return self.V if self.shard is None else self.shard.widest

    def rows(self, leaves: Leaves, labels: Tensor, index: Tensor) -> Rows:
        """Gather the rows at these positions."""
        labels = labels.reshape(-1)[index]
        if self.shard is not None:
            labels = self.shard.labels(labels, self.options.transform.ignore_index)
        return gathered(leaves, self.options.compute_dtype, index, labels)

    def plan(self, rows: int, keeps: bool, spared: int) -> Chunks:
        """Call the function `plan` for this head."""
        return plan(
            self.op, self.options, self.widest, rows, self.device.type == "cuda", keeps, spared
        )

    def buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        return buffer(rows, self.V, dtype, self.device)

    def logits(self, rows: Rows, part: slice, out: Tensor) -> Tensor:
        weight, lora_weight = self.weights
        gemm.project(rows.hidden[part], weight, out)
        if rows.lora_hidden is not None and lora_weight is not None:
            gemm.project(rows.lora_hidden[part], lora_weight, out, accumulate=True)
        return out if self.leaves.bias is None else out.add_(self.leaves.bias)

    def backproject(self, p: Tensor, us: list[Tensor]) -> None:
        """Write P `[n, V]` times weight and lora_weight to `[n, H]` and `[n, r]`, fp32.

        Outputs without columns are skipped.
        """
        for u, weight in zip(us, self.weights):
            if u.shape[1] and weight is not None:
                gemm.backproject(p, weight, u)

    def show(self, logits: Tensor, labels: Tensor) -> None:
        """Pass the logits to the caller's `on_logits`, if there is one."""
        if self.on_logits is not None:
            t = self.options.transform
            transform = {
                "temperature": t.temperature,
                "logit_scale": t.logit_scale,
                "softcap": t.softcap or None,
            }
            with _showing(None):  # calls that it makes itself show it nothing
                self.on_logits(logits, labels, transform)


def gathered(leaves: Leaves, dtype: torch.dtype, index: Tensor, labels: Tensor) -> Rows:
    """Gather the rows at these positions in the GEMMs' dtype, with their labels `[n]`."""

    def gather(x: Tensor) -> Tensor:
        x = x.reshape(-1, x.shape[-1])
        return (x if index.shape[0] == len(x) else x[index]).to(dtype)

    lora_hidden = None if leaves.lora_hidden is None else gather(leaves.lora_hidden)
    return Rows(index, gather(leaves.hidden), lora_hidden, labels)


def buffer(rows: int, V: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate `[rows, V]` with rows that begin at multiples of 16 bytes."""
    return torch.empty((rows, -(-V // 16) * 16), dtype=dtype, device=device)[:, :V]


def plan(
    op: str, options: Options, V: int, rows: int, is_gpu: bool, keeps: bool, spared: int = 0
) -> Chunks:
    """Decide how many of `rows` rows exist at a time.

    With `keeps`, P waits for coefficients in what a chunk of logits leaves of the workspace. Where
    P of all rows then fits, it may also use `spared` bytes per column, which the sum of dweight no
    longer needs.
    """
    V, rows = max(V, 1), max(rows, 1)
    in_place = options.logits_dtype == options.compute_dtype
    # bytes of one row
    logits, p = (
        options.logits_dtype.itemsize * V,
        options.compute_dtype.itemsize * V,
    )
    needed = logits if in_place else logits + p
    if options.workspace_bytes < needed:
        raise ValueError(
            f"{op}: `workspace_bytes` must hold one row of {V} logits, at least {needed}; got "
            f"{options.workspace_bytes}"
        )
    chunk = min(
        GPU_CHUNK_ROWS if is_gpu else CPU_CHUNK_ROWS, options.workspace_bytes // needed, rows
    )
    room = options.workspace_bytes - (0 if in_place else chunk * logits)
    if keeps and rows <= (room + spared * V) // p:
        return Chunks(chunk, rows)
    waiting = room // p if keeps else min(GPU_FROZEN_ROWS if is_gpu else chunk, room // p)
    return Chunks(chunk, rows if rows <= waiting else waiting // chunk * chunk)
