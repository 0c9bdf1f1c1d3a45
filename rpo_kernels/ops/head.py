"""An lm_head whose logits exist a chunk of scored rows at a time."""

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
# Rows of a logits chunk, enough for the GEMMs' full rate. On a CPU fewer, so that the row passes
# find them in the cache.
GPU_CHUNK_ROWS = 1024
CPU_CHUNK_ROWS = 256
# Rows of P that one dhidden GEMM takes under a frozen head: enough tiles for every multiprocessor.
GPU_FROZEN_ROWS = 4096


# The function that is shown the logits of the call that runs now; operators take plain types, so it
# does not travel with them.
OnLogits = Callable[[Tensor, Tensor, dict], None] | None
_on_logits: ContextVar[OnLogits] = ContextVar("on_logits", default=None)


def shown_to(op: str, on_logits: OnLogits) -> contextlib.AbstractContextManager:
    """Within it, heads that compute logits show them to ``on_logits``."""
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
    """How hidden states become logits, and where."""

    transform: LogitTransform
    compute_dtype: torch.dtype  # of the GEMMs' inputs
    logits_dtype: torch.dtype
    workspace_bytes: int
    backend: str
    vocab_ranks: str = ""  # name of the process group whose ranks hold the vocabulary together
    reduce_dhidden: bool = True  # whether gradients of hidden states are summed over these ranks


class Leaves(NamedTuple):
    """What logits are made of, and may have gradients: x = hidden weight^T + lora_hidden
    lora_weight^T + bias.
    """

    hidden: Tensor  # [..., H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    lora_hidden: Tensor | None  # [..., r]
    lora_weight: Tensor | None  # [V, r]

    def needs(self) -> list[bool]:
        """Which of them a gradient is asked for."""
        grad = torch.is_grad_enabled()
        return [grad and x is not None and x.requires_grad for x in self]


class Needs(NamedTuple):
    """Of which leaves a gradient is asked for, by name."""

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
    labels: Tensor  # [n] int64; of a shard, counted from its first column

    @property
    def size(self) -> int:
        return self.index.shape[0]


class Chunks(NamedTuple):
    """How many rows exist at a time."""

    logits: int  # of logits
    waiting: int  # of P: a multiple of the above, or all rows


class Head:
    """Weights, bias, and the vocabulary pass over chunks of their logits."""

    def __init__(
        self, op: str, leaves: Leaves, options: Options, shard: distributed.Shard | None = None
    ):
        """With a shard, only its columns; labels count from its first one."""
        self.op, self.options, self.shard = op, options, shard
        self.leaves, self.V, self.device = leaves, leaves.weight.shape[0], leaves.weight.device
        self.on_logits = _on_logits.get()
        # dlogits are written over the logits where both have one dtype
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
        """weight and lora_weight in the GEMMs' dtype: a copy only where a GEMM needs one."""
        dtype, lora_weight = self.options.compute_dtype, self.leaves.lora_weight
        return self.leaves.weight.to(dtype), None if lora_weight is None else lora_weight.to(dtype)

    @property
    def widest(self) -> int:
        """Columns of the widest shard, for plans that are the same on all ranks."""
        return self.V if self.shard is None else self.shard.widest

    def rows(self, leaves: Leaves, labels: Tensor, index: Tensor) -> Rows:
        """The rows of these positions."""
        labels = labels.reshape(-1)[index]
        if self.shard is not None:
            labels = self.shard.labels(labels, self.options.transform.ignore_index)
        return gathered(leaves, self.options.compute_dtype, index, labels)

    def plan(self, rows: int, keeps: bool, spared: int) -> Chunks:
        """See :func:`plan`."""
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
        """P ``[n, V]`` times weight and lora_weight, into ``[n, H]`` and ``[n, r]`` fp32, where
        these have columns.
        """
        for u, weight in zip(us, self.weights):
            if u.shape[1] and weight is not None:
                gemm.backproject(p, weight, u)

    def show(self, logits: Tensor, labels: Tensor) -> None:
        """To the caller's function, where there is one."""
        if self.on_logits is not None:
            t = self.options.transform
            transform = {
                "temperature": t.temperature,
                "logit_scale": t.logit_scale,
                "softcap": t.softcap or None,
            }
            self.on_logits(logits, labels, transform)


def gathered(leaves: Leaves, dtype: torch.dtype, index: Tensor, labels: Tensor) -> Rows:
    """Rows of these positions, in the GEMMs' dtype, with their labels ``[n]``."""

    def gather(x: Tensor) -> Tensor:
        x = x.reshape(-1, x.shape[-1])
        return (x if index.shape[0] == len(x) else x[index]).to(dtype)

    lora_hidden = None if leaves.lora_hidden is None else gather(leaves.lora_hidden)
    return Rows(index, gather(leaves.hidden), lora_hidden, labels)


def buffer(rows: int, V: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[rows, V]`` whose rows begin at multiples of 16 bytes."""
    return torch.empty((rows, -(-V // 16) * 16), dtype=dtype, device=device)[:, :V]


def plan(
    op: str, options: Options, V: int, rows: int, is_gpu: bool, keeps: bool, spared: int = 0
) -> Chunks:
    """How many of ``rows`` rows in all exist at a time.

    ``keeps``: P waits for coefficients, in what the workspace leaves beside a chunk of logits; and
    in ``spared`` bytes of a column more, which a sum of dweight would take, where that is room for
    P of all rows.
    """
    V, rows = max(V, 1), max(rows, 1)
    in_place = options.logits_dtype == options.compute_dtype
    # bytes of a row
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
