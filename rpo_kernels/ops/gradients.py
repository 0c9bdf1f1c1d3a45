"""Gradients of an lm_head whose coefficients become known after the logits are gone.

The gradient of a token's log-probability in its logits, P = dlogp/dlogits `[n, V]`, does not depend
on the loss. So each chunk of logits is turned into P, and P into U = P weight `[n, H]`, at once.
The coefficients c = dL/dlogp `[n]` enter when they are known, on the small side of both GEMMs:

    dhidden = c * U        dweight = P^T (c * hidden)        dbias = P^T c
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from .. import distributed, gemm
from .head import Chunks, Head, Leaves, Needs, Options, Rows, buffer


def over_tokens(needs: list[bool]) -> bool:
    """Return whether any required gradient sums over tokens, so that P must be kept."""
    wanted = Needs(*needs)
    return bool(wanted.weight or wanted.bias or wanted.lora_weight)  # in a trace they are 0 or 1


def spared_bytes(
    leaves: Leaves, needs: list[bool], options: Options, weight_grad: Tensor | None
) -> int:
    """Bytes per column of the head that P may use where no fp32 sum of dweight is needed."""
    sums = needs[1] and leaves.weight.dtype == options.compute_dtype == torch.bfloat16
    return (
        4 * leaves.weight.shape[1]
        if sums and (weight_grad is None or weight_grad.dtype != torch.float32)
        else 0
    )


class Kept(NamedTuple):
    """Tensors that wait for the coefficients, in a form that autograd can save.

    Buffers may have more rows than are used.
    """

    index: Tensor  # type: ignore[assignment]  # [n] int64: flat positions of the rows
    labels: Tensor  # [n] int64
    logps: Tensor  # [n] fp32
    lse: Tensor  # [2, n] fp32
    entropies: Tensor  # [n] fp32, or empty
    p: Tensor  # [k, V]: P of the last rows
    u: Tensor  # [n, H] fp32: P weight
    u_lora: Tensor  # [n, r] fp32: P lora_weight
    sizes: Tensor  # [2] int64 on the CPU: n, and the number of rows without P


# gradients of hidden, weight, bias, lora_hidden, lora_weight
FiveTensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class LiveReference(NamedTuple):
    """A reference policy that is evaluated on the same rows, along with the policy."""

    head: Head
    rows: Rows
    logps: Tensor  # [n] fp32


class Store:
    """Log-probabilities of rows, and what their gradients are computed from once c is known.

    P is kept for as many rows as fit into the workspace, the last ones read; the logits of the
    other rows are recomputed. U is kept for all rows.
    """

    def __init__(
        self,
        head: Head,
        rows: Rows,
        needs: list[bool],
        chunks: Chunks,
        tensors: Kept,
        held: slice,
        is_saved: bool = False,
    ):
        """Store over `tensors` with P of the rows `held`; not written to if `is_saved`."""
        self.head, self.rows, self.needs, self.chunks, self.tensors = (
            head,
            rows,
            needs,
            chunks,
            tensors,
        )
        self.held, self.is_saved, self.differentiable = held, is_saved, any(needs)
        self.ones = torch.ones(chunks.logits, dtype=torch.float32, device=head.device)
        self.scratch: Tensor | None = None

    @staticmethod
    def new(
        head: Head,
        rows: Rows,
        needs: list[bool],
        chunks: Chunks,
        entropy: bool = False,
        size: int | None = None,
    ) -> Store:
        """Allocate a store for `rows`; its buffers have `size` rows, if that is given."""
        n = rows.size if size is None else size
        floats: dict[str, Any] = {"dtype": torch.float32, "device": head.device}
        p = head.buffer(min(n, max(chunks)) if any(needs) else 0, head.options.compute_dtype)
        index, labels = (
            torch.nn.functional.pad(x, (0, n - rows.size)) for x in (rows.index, rows.labels.long())
        )
        tensors = Kept(
            index,
            labels,
            torch.empty(n, **floats),
            torch.empty((2, n), **floats),
            torch.empty(n if entropy else 0, **floats),
            p,
            *_empty_u(rows, needs, n),
            torch.tensor([rows.size, 0], device="cpu"),
        )
        if n > rows.size:
            for x in (
                tensors.logps,
                tensors.lse.t(),
                tensors.entropies,
                p,
                tensors.u,
                tensors.u_lora,
            ):
                x[rows.size :] = 0
        return Store(head, rows, needs, chunks, tensors, slice(0, 0))

    @property
    def logps(self) -> Tensor:
        return self.tensors.logps

    def _chunk(self, size: int) -> Tensor:
        """Return memory for a chunk of logits that is not computed in P's buffer."""
        if self.scratch is None:
            rows = min(len(self.logps), self.chunks.logits)
            self.scratch = self.head.buffer(rows, self.head.options.logits_dtype)
        return self.scratch[:size]

    def read(self, part: slice, reference: LiveReference | None = None) -> None:
        """Compute log-probabilities, P and U of the rows `part`, chunk by chunk.

        The log-probabilities of `reference` are computed in the same loop.
        """
        head, (_, _, all_logps, all_lse, entropies, p, *us, _) = self.head, self.tensors
        self.held = slice(part.stop, part.stop)
        for batch in self._batches(part):
            for chunk in _split(batch, self.chunks.logits):
                size, offset = chunk.stop - chunk.start, chunk.start - batch.start
                slot = p[offset : offset + size]
                out = slot if head.in_place and self.differentiable else self._chunk(size)
                labels = self.rows.labels[chunk]
                if reference is not None:
                    logits = reference.head.logits(reference.rows, chunk, out)
                    reference.logps[chunk] = reference.head.vocabulary_forward(
                        logits[None], labels, head.transform
                    )[0]
                logits = head.logits(self.rows, chunk, out)
                head.show(logits, labels)
                logps, lse, h = head.vocabulary_forward(
                    logits[None], labels, head.transform, len(entropies) > 0
                )
                all_logps[chunk], all_lse[:, chunk] = logps, lse
                if h is not None:
                    entropies[chunk] = h
                if self.differentiable:
                    head.vocabulary_backward(
                        logits[None],
                        labels,
                        logps,
                        lse,
                        self.ones[:size],
                        head.transform,
                        slot[None],
                    )
            if self.differentiable:
                size = batch.stop - batch.start
                self.held = batch if size <= self.chunks.waiting else slice(batch.stop, batch.stop)
                head.backproject(p[:size], [u[batch] for u in us])

    def _batches(self, part: slice) -> Iterator[slice]:
        """Split `part` into batches that share the buffer of P and begin at whole chunks.

        The last batch is the largest that may be kept.
        """
        chunk, waiting = self.chunks
        size = part.stop - part.start
        if not self.differentiable:
            yield part
            return
        first = part.start + (0 if size <= waiting else -(-(size - waiting) // chunk) * chunk)
        whole = max(waiting // chunk, 1) * chunk
        yield from _split(slice(part.start, min(first, part.stop)), whole)
        if first < part.stop:
            yield slice(first, part.stop)

    def settle(self, part: slice, coef: Tensor, gradients: Gradients) -> None:
        """Add the gradients of the rows `part`, the last one read, given their dL/dlogp `[n]`."""
        held, p = self.held, self.tensors.p
        gradients.add_hidden(part, self.tensors.u[part], self.tensors.u_lora[part], coef)
        if not over_tokens(self.needs):
            return
        if held.stop > held.start:
            gradients.add_tokens(held, p[: held.stop - held.start], coef[held.start - part.start :])
        if held.start > part.start:
            p = self.head.buffer(self.chunks.logits, p.dtype) if self.is_saved else p
            for batch in _split(slice(part.start, held.start), len(p)):
                gradients.add_tokens(
                    batch, self._dlogits(batch, p), coef[batch.start - part.start :]
                )

    def settle_with_entropies(
        self, coef: Tensor, entropy_coef: Tensor | None, gradients: Gradients
    ) -> None:
        """Add the gradients of all rows, from recomputed logits and dL/dlogp, dL/dentropy `[n]`."""
        n, head = self.rows.size, self.head
        p = head.buffer(min(n, self.chunks.waiting), head.options.compute_dtype)
        scale = torch.ones((), device=head.device)
        if p.dtype == torch.float16 and n:
            scale = _near_one(
                torch.stack([coef, coef if entropy_coef is None else entropy_coef]).abs().max()
            )
        unscale = (1 / scale).expand(n)
        coef, entropy_coef = coef * scale, None if entropy_coef is None else entropy_coef * scale
        us = _empty_u(self.rows, self.needs, n)
        for batch in _split(slice(0, n), len(p)):
            dlogits = self._dlogits(batch, p, coef, entropy_coef)
            head.backproject(dlogits, [u[batch] for u in us])
            gradients.add_tokens(batch, dlogits, unscale)
        # in one call: ranks sum it together, and their batches differ
        gradients.add_hidden(slice(0, n), *us, unscale)

    def _dlogits(
        self,
        batch: slice,
        p: Tensor,
        coef: Tensor | None = None,
        entropy_coef: Tensor | None = None,
    ) -> Tensor:
        """Write dlogits of `batch` to `p`, from recomputed logits.

        The coefficients are `[n]` for all rows; without them the result is P.
        """
        head, (_, _, logps, lse, entropies, *_) = self.head, self.tensors
        for at in _split(batch, self.chunks.logits):
            size, offset = at.stop - at.start, at.start - batch.start
            slot = p[offset : offset + size]
            logits = head.logits(self.rows, at, slot if head.in_place else self._chunk(size))
            head.vocabulary_backward(
                logits[None],
                self.rows.labels[at],
                logps[at],
                lse[:, at].contiguous(),
                self.ones[:size] if coef is None else coef[at],
                head.transform,
                slot[None],
                entropies=None if entropy_coef is None else entropies[at],
                entropy_coef=None if entropy_coef is None else entropy_coef[at],
            )
        return p[: batch.stop - batch.start]

    def kept(self) -> Kept:
        """Return the store as tensors; rows without P come first."""
        if not over_tokens(self.needs):
            return self.tensors._replace(p=self.head.buffer(0, self.tensors.p.dtype))
        p = self.tensors.p if self.chunks.waiting else self.head.buffer(0, self.tensors.p.dtype)
        return self.tensors._replace(
            p=p, sizes=torch.tensor([self.rows.size, self.held.start], device="cpu")
        )

    @staticmethod
    def fake_kept(
        leaves: Leaves,
        needs: list[bool],
        options: Options,
        chunks: Chunks,
        size: int,
        entropy: bool,
    ) -> Kept:
        """Return empty tensors with the shapes of `kept`."""
        x, lora_hidden, wanted = leaves.hidden, leaves.lora_hidden, Needs(*needs)
        floats, ints = x.new_empty(size, dtype=torch.float32), x.new_empty(size, dtype=torch.int64)
        waits = over_tokens(needs) and chunks.waiting > 0
        p = buffer(
            min(size, chunks.waiting) if waits else 0,
            leaves.weight.shape[0],
            options.compute_dtype,
            x.device,
        )
        width = x.shape[-1] if wanted.hidden else 0
        rank = lora_hidden.shape[-1] if lora_hidden is not None and wanted.lora_hidden else 0
        return Kept(
            ints,
            torch.empty_like(ints),
            floats,
            floats.new_empty((2, size)),
            floats.new_empty(size if entropy else 0),
            p,
            floats.new_empty((size, width)),
            floats.new_empty((size, rank)),
            torch.empty(2, dtype=torch.int64, device="cpu"),
        )


def _empty_u(rows: Rows, needs: list[bool], n: int) -> tuple[Tensor, Tensor]:
    """Allocate P weight `[n, H]` and P lora_weight `[n, r]`, fp32; no columns if not needed."""
    wanted = Needs(*needs)

    def empty(x: Tensor | None, want: bool) -> Tensor:
        width = x.shape[1] if x is not None and want else 0
        return torch.empty((n, width), dtype=torch.float32, device=rows.index.device)

    return empty(rows.hidden, wanted.hidden), empty(rows.lora_hidden, wanted.lora_hidden)


def _near_one(largest: Tensor) -> Tensor:
    """Return the power of two that scales `largest` to about 1, where fp16 is most precise."""
    return torch.ldexp(
        torch.ones_like(largest), -largest.log2().ceil().nan_to_num(0, 0, 0).clamp(-60, 60)
    )


def _split(part: slice, rows: int) -> Iterator[slice]:
    for start in range(part.start, part.stop, max(rows, 1)):
        yield slice(start, min(start + rows, part.stop))


class Gradients:
    """Gradients of `Leaves`, summed over parts of the rows in fp32 and rounded once."""

    def __init__(
        self,
        leaves: Leaves,
        needs: list[bool],
        rows: Rows,
        options: Options,
        *,
        once: bool,
        weight_grad: Tensor | None = None,
        early: bool = False,
    ):
        """Prepare the sums; `once` if P of all rows arrives in one call.

        dweight is added to `weight_grad` if that is given. With `early` the upstream gradient is
        not known yet: gradients of fp16 leaves, which might overflow before it is applied, stay in
        fp32.
        """
        self.leaves, self.rows, self.weight_grad, self.early = leaves, rows, weight_grad, early
        wanted = Needs(*needs)
        group = options.vocab_ranks if options.reduce_dhidden else ""

        def of_hidden(x: Tensor | None, wanted: bool) -> _HiddenGradient | None:
            if x is None or not wanted:
                return None
            return _HiddenGradient(x, rows, dtype_of(x, early), group)

        def of_weight(
            x: Tensor | None, wanted: bool, into: Tensor | None
        ) -> _WeightGradient | None:
            if x is None or not wanted:
                return None
            return _WeightGradient(x, dtype_of(x, early), once, into)

        self.dhidden = of_hidden(leaves.hidden, wanted.hidden)
        self.dlora_hidden = of_hidden(leaves.lora_hidden, wanted.lora_hidden)
        self.dweight = of_weight(leaves.weight, wanted.weight, weight_grad)
        self.dlora_weight = of_weight(leaves.lora_weight, wanted.lora_weight, None)
        self.dbias: Tensor | None = None
        if leaves.bias is not None and wanted.bias:
            self.dbias = torch.zeros_like(leaves.bias, dtype=torch.float32)

    def add_hidden(self, part: slice, u: Tensor, u_lora: Tensor, coef: Tensor) -> None:
        """Add dhidden = coef * U for these rows, coef `[n]`."""
        for gradient, x in ((self.dhidden, u), (self.dlora_hidden, u_lora)):
            if gradient is not None:
                gradient.add(part, x, coef)

    def add_tokens(self, part: slice, p: Tensor, coef: Tensor) -> None:
        """Add P `[n, V]` of these rows times coef `[>= n]` to the sums over tokens."""
        coef = coef[: len(p)]
        for gradient, x in (
            (self.dweight, self.rows.hidden),
            (self.dlora_weight, self.rows.lora_hidden),
        ):
            if gradient is not None and x is not None:
                gradient.add(p, x[part], coef)
        if self.dbias is not None:
            gemm.bias_gradient(p, coef, self.dbias)

    def finish(self) -> FiveTensors:
        """Return the gradients in the order, shapes and dtypes of the leaves.

        A gradient is empty where none is required, or where `weight_grad` holds it.
        """
        gradients = [
            None if self.dhidden is None else self.dhidden.finish(),
            None if self.dweight is None else self.dweight.finish(),
            self.dbias,
            None if self.dlora_hidden is None else self.dlora_hidden.finish(),
            None if self.dlora_weight is None else self.dlora_weight.finish(),
        ]
        empty = empty_gradients(self.leaves, [False] * 5, None, self.early)
        finished = (
            none if leaf is None or x is None else x.to(dtype_of(leaf, self.early)).view(leaf.shape)
            for leaf, x, none in zip(self.leaves, gradients, empty)
        )
        return cast(FiveTensors, tuple(finished))


def empty_gradients(
    leaves: Leaves, needs: list[bool], weight_grad: Tensor | None, early: bool = False
) -> FiveTensors:
    """Return empty tensors with the shapes and dtypes of `Gradients.finish`."""
    wanted = Needs(*needs)._replace(weight=needs[1] and weight_grad is None)
    empty = (
        leaf.new_empty(leaf.shape, dtype=dtype_of(leaf, early))
        if leaf is not None and want
        else leaves.hidden.new_empty(0)
        for leaf, want in zip(leaves, wanted)
    )
    return cast(FiveTensors, tuple(empty))


def dtype_of(leaf: Tensor, early: bool) -> torch.dtype:
    return torch.float32 if early and leaf.dtype == torch.float16 else leaf.dtype


class _HiddenGradient:
    """coef * U at the scored rows, 0 elsewhere.

    With a process group it is summed over the ranks; the sums overlap the work that follows.
    """

    def __init__(self, hidden: Tensor, rows: Rows, dtype: torch.dtype, group: str):
        self.index, self.group = rows.index, group
        self.shape = hidden.shape[:-1].numel(), hidden.shape[-1]
        self.waits: list[Callable[[], object]] = []
        # rows that are summed over ranks are contiguous
        self.total = (
            hidden.new_empty((rows.size, self.shape[1]), dtype=dtype)
            if group
            else hidden.new_zeros(self.shape, dtype=dtype)
        )

    def add(self, part: slice, u: Tensor, coef: Tensor) -> None:
        coef = coef[:, None]
        u = torch.where(coef == 0, 0, coef * u)
        if self.group:
            self.waits.append(distributed.start_sum(self.total[part].copy_(u), self.group))
        else:
            self.total[self.index[part]] = u.to(self.total.dtype)

    def finish(self) -> Tensor:
        for wait in self.waits:
            wait()
        if not self.group or len(self.total) == self.shape[0]:
            return self.total
        return self.total.new_zeros(self.shape).index_copy_(0, self.index, self.total)


class _WeightGradient:
    """P^T (coef * x), summed in fp32 and rounded once, or added to a buffer of the caller."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, once: bool, into: Tensor | None):
        """Prepare the sum: of one product if `once`; into the caller's buffer `into` `[V, H]`."""
        self.weight, self.dtype, self.once, self.into = weight, dtype, once, into
        self.scale: Tensor | None = None
        self.total: Tensor | None = None

    def add(self, p: Tensor, x: Tensor, coef: Tensor) -> None:
        """Add the product of p `[n, V]` and coef `[n]` times x `[n, H]`; p and x have one dtype."""
        scale = None
        if x.dtype == torch.float16:
            scale = _near_one(coef.abs().max())  # divided out of the fp32 sum
            coef = coef * scale
        x = torch.where(coef[:, None] == 0, 0, coef[:, None] * x).to(x.dtype)
        if self.total is not None and self.scale is not None and scale is not None:
            self.total *= scale / self.scale
        self.scale = scale
        total = self._buffer(x) if self.total is None else self.total
        accumulate = total is not None
        if total is None:
            exact = (
                not self.once or scale is not None or self.dtype != x.dtype or self.into is not None
            )
            total = torch.empty_like(self.weight, dtype=torch.float32 if exact else self.dtype)
        self.total = total
        gemm.weight_gradient(p, x, total, accumulate)

    def _buffer(self, x: Tensor) -> Tensor | None:
        """Return the caller's buffer if products can go into it: fp32, or the only product."""
        if self.into is None or x.dtype == torch.float16:
            return None
        return self.into if self.once or self.into.dtype == torch.float32 else None

    def finish(self) -> Tensor | None:
        if self.total is not None and self.scale is not None:
            self.total /= self.scale
        if self.into is None:
            return (
                torch.zeros_like(self.weight, dtype=self.dtype)
                if self.total is None
                else self.total
            )
        if self.total is not None and self.total is not self.into:
            for into, rows in gemm.blocks(self.into, self.total):  # a CPU upcasts the summand
                into.add_(rows)
        return None
