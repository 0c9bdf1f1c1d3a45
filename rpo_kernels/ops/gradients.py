"""Gradients of an lm_head's leaves, gathered chunk by chunk from dlogits.

dlogits wait in a buffer until it is full, so that few large GEMMs make the weight's gradient. Rows of hidden states, of which each
rank of a process group has a part, are summed over the ranks as soon as a chunk's are there, beside the GEMMs of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import distributed, gemm
from .head import Chunks, Head, Leaves, Scored


class Gradients:
    """Gradients of :class:`Leaves`, gathered chunk by chunk."""

    def __init__(
        self, head: Head, leaves: Leaves, needs: Sequence[bool], chunks: Chunks, rows: int, weight_grad: Tensor | None = None,
        buffer: Tensor | None = None, scale: Tensor | None = None, early: bool = False,
    ):  # fmt: skip
        """``rows`` will come in all. ``weight_grad`` takes in dweight, if it is given; ``buffer`` ``[rows, V]`` holds all dlogits.

        dlogits come times ``scale`` ``[]``, which is taken out of what is made of them. With ``early`` an upstream gradient is
        still to come: gradients of fp16 leaves, which could not hold them before, stay in fp32.
        """
        self.head, self.leaves, self.early = head, leaves, early
        needs = Leaves(*needs)
        group = head.options.group if head.options.reduce_dhidden else ""
        self.dhidden = _HiddenGradient(leaves.hidden, rows, group, scale) if needs.hidden else None
        self.dlora_hidden = _HiddenGradient(leaves.lora_hidden, rows, group, scale) if needs.lora_hidden else None
        self.dbias = torch.zeros(head.V, dtype=torch.float32, device=head.weight.device) if needs.bias else None
        once = rows <= chunks.waiting or buffer is not None
        self.dweight = _WeightGradient(leaves.weight, once, weight_grad, scale) if needs.weight else None
        self.dlora_weight = _WeightGradient(leaves.lora_weight, once, None, scale) if needs.lora_weight else None
        self.scale = scale
        self.buffer = head.buffer(min(chunks.waiting, rows), head.options.compute_dtype) if buffer is None else buffer
        self.waiting: list[Scored] = []
        self.filled = 0

    @staticmethod
    def keep_dlogits(needs: Sequence[bool]) -> bool:
        """Whether dlogits wait for others: for the GEMMs over tokens."""
        return Leaves(*needs).weight or Leaves(*needs).lora_weight

    def slot(self, rows: int) -> Tensor:
        """Where the next ``rows`` rows of dlogits go; logits too, where they share a dtype."""
        if self.filled + rows > self.buffer.shape[0]:
            self._flush()
        return self.buffer[self.filled : self.filled + rows]

    def add(self, rows: Scored, dlogits: Tensor) -> None:
        """Take in the dlogits of a slot."""
        if self.dhidden:
            self.dhidden.add(rows.index, gemm.backproject(dlogits, self.head.weight))
        if self.dlora_hidden:
            self.dlora_hidden.add(rows.index, gemm.backproject(dlogits, self.head.lora_weight))
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=torch.float32)
        if self.dweight or self.dlora_weight:
            self.waiting.append(rows)
            self.filled += rows.size

    def _flush(self) -> None:
        if not self.filled:
            return
        dlogits = self.buffer[: self.filled]
        if self.dweight:
            self.dweight.add(dlogits, _joined([rows.hidden for rows in self.waiting]))
        if self.dlora_weight:
            self.dlora_weight.add(dlogits, _joined([rows.lora for rows in self.waiting]))
        self.waiting, self.filled = [], 0

    def finish(self) -> list[Tensor]:
        """Gradients in the order, shapes and dtypes of the leaves; empty where none is asked for or autograd gets none."""
        self._flush()
        del self.buffer
        if self.dbias is not None and self.scale is not None:
            self.dbias /= self.scale
        gradients = [
            self.dhidden and self.dhidden.finish(), self.dweight and self.dweight.finish(), self.dbias,
            self.dlora_hidden and self.dlora_hidden.finish(), self.dlora_weight and self.dlora_weight.finish(),
        ]  # fmt: skip
        return [
            self.leaves.hidden.new_empty(0) if gradient is None else gradient.to(_dtype(leaf, self.early)).view(leaf.shape)
            for gradient, leaf in zip(gradients, self.leaves)
        ]


def empty_gradients(leaves: Leaves, needs: Sequence[bool], weight_grad: Tensor | None, early: bool = False) -> tuple[Tensor, ...]:
    """What :meth:`Gradients.finish` returns, without values."""
    wanted = Leaves(*needs)._replace(weight=needs[1] and weight_grad is None)
    return tuple(
        leaf.new_empty(leaf.shape, dtype=_dtype(leaf, early)) if want else leaves.hidden.new_empty(0)
        for leaf, want in zip(leaves, wanted)
    )


def _dtype(leaf: Tensor, early: bool) -> torch.dtype:
    return torch.float32 if early and leaf.dtype == torch.float16 else leaf.dtype


class _HiddenGradient:
    """dlogits weight at the scored rows, 0 elsewhere, in the dtype of the hidden states; in fp32 where scale is taken out."""

    def __init__(self, hidden: Tensor, rows: int, group: str, scale: Tensor | None):
        """For ``rows`` scored rows, which are summed over the ranks of a named group, chunk by chunk and in their order."""
        self.shape = hidden.shape[:-1].numel(), hidden.shape[-1]
        self.group, self.filled, self.scale = group, 0, scale
        dtype = hidden.dtype if scale is None else torch.float32
        # Rows that travel lie side by side.
        self.rows = hidden.new_empty((rows, self.shape[1]), dtype=dtype) if group else hidden.new_zeros(self.shape, dtype=dtype)
        self.indices: list[Tensor] = []
        self.waits: list[Callable[[], object]] = []

    def add(self, index: Tensor, rows: Tensor) -> None:
        if self.scale is not None:
            rows = rows.float() / self.scale
        if not self.group:
            self.rows[index] = rows.to(self.rows.dtype)
            return
        part = self.rows[self.filled : self.filled + rows.shape[0]].copy_(rows)
        self.filled += rows.shape[0]
        self.indices.append(index)
        self.waits.append(distributed.start_sum(part, self.group))

    def finish(self) -> Tensor:
        for wait in self.waits:
            wait()
        if not self.group or self.filled == self.shape[0]:  # rows come in order
            return self.rows
        everywhere = self.rows.new_zeros(self.shape)
        return everywhere.index_copy_(0, _joined(self.indices), self.rows) if self.filled else everywhere


class _WeightGradient:
    """dlogits^T x, summed over flushes in fp32 and rounded once, or added to a buffer of the caller's."""

    def __init__(self, weight: Tensor, once: bool, into: Tensor | None, scale: Tensor | None):
        """``once`` if there is one flush at most; ``into`` ``[V, H]`` takes in the gradient."""
        self.weight, self.into, self.scale = weight, into, scale
        self.once = once and scale is None  # scale is taken out of an fp32 sum
        at_once = scale is None and into is not None and (once or into.dtype == torch.float32)
        self.total = into if at_once else None

    def add(self, dlogits: Tensor, x: Tensor) -> None:
        if self.total is None and not self.once:
            self.total = torch.zeros(self.weight.shape, dtype=torch.float32, device=x.device)
        self.total = gemm.weight_gradient(dlogits, x, self.total)

    def finish(self) -> Tensor | None:
        if self.scale is not None and self.total is not None:
            self.total /= self.scale
        if self.into is None:
            return torch.zeros_like(self.weight) if self.total is None else self.total
        if self.total is not None and self.total is not self.into:
            for into, rows in gemm.blocks(self.into, self.total):  # a CPU upcasts what is added to
                into.add_(rows)
        return None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
