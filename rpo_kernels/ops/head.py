"""An lm_head worked off in chunks of rows: what both linear operations are made of.

Only scored rows take part. A chunk's logits are computed, read by the vocabulary pass, and turned into dlogits, in place
where the dtypes agree; `gradients` holds what becomes of these.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from .. import distributed, gemm
from ..backend import engine

GPU_WORKSPACE = 1 << 30
CPU_WORKSPACE = 256 << 20
# Rows of a logits chunk, enough for the GEMMs' full rate. On a CPU fewer, so that the row passes find them in the cache.
GPU_CHUNK_ROWS = 1024
CPU_CHUNK_ROWS = 256


# Who wants to see the logits of the operator that runs now. Operators take plain types, so it travels beside them.
OnLogits = Callable[[Tensor, Tensor, dict], None] | None
_on_logits: ContextVar[OnLogits] = ContextVar("on_logits", default=None)


def shown_to(op: str, on_logits: OnLogits) -> contextlib.AbstractContextManager:
    """Within, heads that compute logits show them to ``on_logits``."""
    if on_logits is None:
        return contextlib.nullcontext()
    if not callable(on_logits):
        raise TypeError(f"{op}: `on_logits` must be a function of (logits, labels, transform), got {on_logits!r}")
    if torch.compiler.is_compiling():
        raise ValueError(f"{op}: `on_logits` must be None under torch.compile, whose graph would not hold the call")
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

    temperature: float
    logit_scale: float
    softcap: float
    ignore_index: int
    compute_dtype: torch.dtype  # of the GEMMs' inputs
    logits_dtype: torch.dtype
    workspace_bytes: int
    backend: str
    group: str = ""  # name of the process group whose ranks hold the vocabulary together
    reduce_dhidden: bool = True  # whether gradients of hidden states are summed over its ranks


class Leaves(NamedTuple):
    """What logits are made of, and may have gradients: z = hidden weight^T + lora_hidden lora_weight^T + bias."""

    hidden: Tensor  # [..., H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    lora_hidden: Tensor | None  # [..., r]
    lora_weight: Tensor | None  # [V, r]

    def needs(self) -> list[bool]:
        """Which of them a gradient is asked for."""
        grad = torch.is_grad_enabled()
        return [grad and x is not None and x.requires_grad for x in self]


class Scored(NamedTuple):
    """The scored rows of a batch, pulled together."""

    index: Tensor  # [n] int64, flat positions
    hidden: Tensor  # [n, H] in the compute dtype
    labels: Tensor  # [n]
    lora: Tensor | None = None  # [n, r] in the compute dtype

    @staticmethod
    def of(hidden: Tensor, labels: Tensor, options: Options, count: int | None, lora_hidden: Tensor | None = None) -> Scored:
        """Rows whose label is not ignored. Their number decides shapes: one look at the device, unless it is given."""
        labels = labels.reshape(-1).contiguous()  # kernels know no strides of labels
        scored = labels != options.ignore_index
        if count is None:
            index = scored.nonzero()[:, 0]
        else:
            index = torch.argsort(scored, descending=True, stable=True)[:count]
        everything = index.shape[0] == labels.shape[0]

        def pull(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            x = x.reshape(-1, x.shape[-1])
            return (x if everything else x[index]).to(options.compute_dtype)

        return Scored(index, pull(hidden), labels if everything else labels[index], pull(lora_hidden))

    @property
    def size(self) -> int:
        return self.index.shape[0]

    def part(self, rows: slice) -> Scored:
        return Scored(*(None if x is None else x[rows] for x in self))


class Head:
    """Weights, bias and the vocabulary passes over chunks of their logits."""

    def __init__(
        self, op: str, weight: Tensor, bias: Tensor | None, options: Options, lora_weight: Tensor | None = None,
        shard: distributed.Shard | None = None, widest: int | None = None,
    ):  # fmt: skip
        """With a shard, its columns alone; labels count from its first one. ``widest``: columns of the largest shard,
        without one: plans are made for it, so that they are the same on all ranks, which gather and sum chunk by chunk."""
        self.op, self.options, self.shard = op, options, shard
        self.weight = weight.to(options.compute_dtype)
        self.lora_weight = None if lora_weight is None else lora_weight.to(options.compute_dtype)
        self.bias = bias
        self.engine = functools.partial(engine, op, options.backend, weight.device)
        self.transform = {name: getattr(options, name) for name in ("temperature", "logit_scale", "softcap", "ignore_index")}
        self.widest = max(1, shard.widest if shard is not None else widest or self.V)
        if shard is not None:
            self.transform["ignore_index"] = distributed.IGNORED

    @property
    def V(self) -> int:
        return self.weight.shape[0]

    def labelled(self, rows: Scored) -> Scored:
        """Rows with labels as :meth:`forward` and :meth:`backward` take them."""
        if self.shard is None:
            return rows
        return rows._replace(labels=self.shard.labels(rows.labels, self.options.ignore_index))

    @property
    def in_place(self) -> bool:
        """Whether dlogits take the logits' place."""
        return self.options.logits_dtype == self.options.compute_dtype

    def buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        """``[rows, V]`` whose rows begin at multiples of 16 bytes."""
        pitch = -(-self.V // 16) * 16
        return torch.empty((rows, pitch), dtype=dtype, device=self.weight.device)[:, : self.V]

    def logits(self, rows: Scored, out: Tensor) -> Tensor:
        gemm.project(rows.hidden, self.weight, out)
        if rows.lora is not None:
            gemm.project(rows.lora, self.lora_weight, out, accumulate=True)
        return out if self.bias is None else out.add_(self.bias)

    def forward(self, logits: Tensor, labels: Tensor, entropy: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        if self.shard is not None:
            return self.shard.forward(self.engine, logits[None], labels, entropy=entropy, **self.transform)
        return self.engine("vocabulary").vocabulary_forward(logits[None], labels, entropy=entropy, **self.transform)

    def shown(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The logits, once the caller's function has seen them."""
        on_logits = _on_logits.get()
        if on_logits is not None:
            transform = {name: getattr(self.options, name) for name in ("temperature", "logit_scale")}
            on_logits(logits, labels, transform | {"softcap": self.options.softcap or None})
        return logits

    def backward(self, logits, labels, logps, lse, coef, out, entropies=None, entropy_coef=None, upstream=None) -> None:
        self.engine("vocabulary").vocabulary_backward(
            logits[None], labels, logps, lse, coef, entropies=entropies, entropy_coef=entropy_coef, upstream=upstream,
            out=out[None], **self.transform,
        )  # fmt: skip


class Chunks(NamedTuple):
    """Sizes, in rows, of what the workspace holds: one chunk of logits and the dlogits that wait."""

    logits: int
    waiting: int

    @staticmethod
    def plan(head: Head, rows: int, largest: int, keeps_dlogits: bool) -> Chunks:
        """For ``rows`` rows in all, some ``largest`` of which would like to share a chunk of logits."""
        options, V = head.options, head.widest
        per_logit, per_dlogit = options.logits_dtype.itemsize * V, options.compute_dtype.itemsize * V
        budget = options.workspace_bytes
        most = Chunks.capacity(options, V)
        if most < 1:
            raise ValueError(
                f"{head.op}: `workspace_bytes` is too small for one row of {V} logits: expected at least "
                f"{per_logit + (0 if head.in_place else per_dlogit)}, got {budget}"
            )
        chunk = GPU_CHUNK_ROWS if head.weight.is_cuda else CPU_CHUNK_ROWS
        chunk = max(1, min(max(chunk, largest), most, rows))
        if not keeps_dlogits:
            return Chunks(chunk, chunk)
        left = budget // per_dlogit if head.in_place else (budget - chunk * per_logit) // per_dlogit
        return Chunks(chunk, max(chunk, min(left, rows)))

    @staticmethod
    def capacity(options: Options, V: int) -> int:
        """Rows whose logits and dlogits fit the workspace together."""
        logit, dlogit = options.logits_dtype, options.compute_dtype
        return options.workspace_bytes // (max(V, 1) * (logit.itemsize + (0 if logit == dlogit else dlogit.itemsize)))
