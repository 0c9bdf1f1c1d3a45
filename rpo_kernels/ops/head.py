"""An lm_head worked off in chunks of rows: what both linear operations are made of.

Only scored rows take part. A chunk's logits are computed, read by the vocabulary pass, and turned into dlogits, in place
where the dtypes agree; dlogits wait in a buffer until it is full, so that few large GEMMs make the weight's gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from .. import gemm
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


class Head:
    """Weight, bias and the vocabulary passes over chunks of their logits."""

    def __init__(self, op: str, weight: Tensor, bias: Tensor | None, options: Options):
        self.op, self.options = op, options
        self.weight = weight.to(options.compute_dtype)
        self.bias = bias
        self.rows = engine(op, options.backend, weight.device, "vocabulary")
        self.transform = {name: getattr(options, name) for name in ("temperature", "logit_scale", "softcap", "ignore_index")}

    @property
    def V(self) -> int:
        return self.weight.shape[0]

    @property
    def in_place(self) -> bool:
        """Whether dlogits take the logits' place."""
        return self.options.logits_dtype == self.options.compute_dtype

    def buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        """``[rows, V]`` whose rows begin at multiples of 16 bytes."""
        pitch = -(-self.V // 16) * 16
        return torch.empty((rows, pitch), dtype=dtype, device=self.weight.device)[:, : self.V]

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        gemm.project(hidden, self.weight, out)
        return out if self.bias is None else out.add_(self.bias)

    def forward(self, logits: Tensor, labels: Tensor, entropy: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows.vocabulary_forward(logits[None], labels, entropy=entropy, **self.transform)

    def shown(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The logits, once the caller's function has seen them."""
        on_logits = _on_logits.get()
        if on_logits is not None:
            transform = {name: getattr(self.options, name) for name in ("temperature", "logit_scale")}
            on_logits(logits, labels, transform | {"softcap": self.options.softcap or None})
        return logits

    def backward(self, logits, labels, logps, lse, coef, out, entropies=None, entropy_coef=None, upstream=None) -> None:
        self.rows.vocabulary_backward(
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
        options, V = head.options, head.V
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
        return options.workspace_bytes // (V * (logit.itemsize + (0 if logit == dlogit else dlogit.itemsize)))


class Gradients:
    """Gradients of hidden states, weight and bias, gathered chunk by chunk."""

    def __init__(self, head: Head, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool], chunks: Chunks, rows: int):
        """``hidden`` ``[N, H]`` and ``weight`` ``[V, H]`` as the caller holds them; ``rows`` will come in all."""
        self.head, self.chunks = head, chunks
        self.needs_hidden, self.needs_weight, self.needs_bias = needs
        self.weight_dtype = weight.dtype
        self.dhidden = torch.zeros_like(hidden) if self.needs_hidden else None
        self.dbias = torch.zeros(head.V, dtype=torch.float32, device=weight.device) if self.needs_bias else None
        self.dweight: Tensor | None = None
        self.flushes_once = rows <= chunks.waiting
        self.buffer = head.buffer(min(chunks.waiting, rows), head.options.compute_dtype)
        self.waiting: list[Tensor] = []
        self.filled = 0

    def slot(self, rows: int) -> Tensor:
        """Where the next ``rows`` rows of dlogits go; logits too, where they share a dtype."""
        if self.filled + rows > self.buffer.shape[0]:
            self._flush()
        return self.buffer[self.filled : self.filled + rows]

    def add(self, index: Tensor, hidden: Tensor, dlogits: Tensor) -> None:
        """Take in the dlogits of a slot, of the rows ``hidden`` ``[n, H]`` at ``index`` ``[n]``."""
        if self.dhidden is not None:
            self.dhidden[index] = gemm.backproject(dlogits, self.head.weight).to(self.dhidden.dtype)
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=torch.float32)
        if self.needs_weight:
            self.waiting.append(hidden)
            self.filled += len(hidden)

    def _flush(self) -> None:
        if not self.filled:
            return
        hidden = self.waiting[0] if len(self.waiting) == 1 else torch.cat(self.waiting)
        if self.dweight is None and not self.flushes_once:
            self.dweight = torch.zeros(self.head.weight.shape, dtype=torch.float32, device=hidden.device)
        self.dweight = gemm.weight_gradient(self.buffer[: self.filled], hidden, self.dweight)
        self.waiting, self.filled = [], 0

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dhidden, dweight, dbias); dweight in its parameter's dtype, dbias in fp32."""
        self._flush()
        del self.buffer
        if self.needs_weight:
            if self.dweight is None:
                self.dweight = torch.zeros(self.head.weight.shape, dtype=self.weight_dtype, device=self.head.weight.device)
            self.dweight = self.dweight.to(self.weight_dtype)
        return self.dhidden, self.dweight, self.dbias


class Scored(NamedTuple):
    """The scored rows of a batch, pulled together."""

    index: Tensor  # [n] int64, flat positions
    hidden: Tensor  # [n, H] in the compute dtype
    labels: Tensor  # [n]

    @staticmethod
    def of(hidden: Tensor, labels: Tensor, options: Options, count: int | None) -> Scored:
        """Rows whose label is not ignored. Their number decides shapes: one look at the device, unless it is given."""
        labels = labels.reshape(-1)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        scored = labels != options.ignore_index
        if count is None:
            index = scored.nonzero()[:, 0]
        else:
            index = torch.argsort(scored, descending=True, stable=True)[:count]
        if index.shape[0] == labels.shape[0]:
            return Scored(index, hidden.to(options.compute_dtype), labels)
        return Scored(index, hidden[index].to(options.compute_dtype), labels[index])
