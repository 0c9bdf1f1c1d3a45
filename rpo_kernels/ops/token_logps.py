"""Token log-probabilities and entropies from logits, with one vocabulary pass in each direction."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import checks, distributed
from ..backend import module_of
from ..inputs import LogitTransform
from .operator import Operator, once_differentiable, only_once


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-probability of each label under its row of logits.

        lp_t = log softmax(z_t)[y_t]
        z = softcap tanh(logit_scale x / softcap) / temperature
            (without softcap: z = logit_scale x / temperature)
        dL/dx_t = dL/dlp_t (onehot(y_t) - softmax(z_t)) dz/dx

    Args:
        logits: `[..., V]` float32, float16 or bfloat16; any strides in the leading dimensions, the
            last one contiguous. A DTensor that is sharded in the last dimension provides the
            process group.
        labels: `[...]` int64 or int32, aligned with logits: `labels[t]` is the token that position
            t predicts (see `shift_labels`). A label outside [0, V) raises on a CPU; on a GPU its
            log-probability is NaN.
        temperature: divides the logits, > 0.
        logit_scale: multiplies the logits, > 0.
        softcap: bound of the logits (Gemma 2), > 0, or None.
        ignore_index: label of a position that is not scored: its logits are not read, its
            log-probability and its gradient are 0.
        inplace_backward: write the gradient over the logits. No other operation may need the logits
            then: autograd raises if one does, and in a second backward. Under `torch.compile` the
            graph's memory planning decides instead.
        process_group: ranks that share the vocabulary: logits are this rank's columns `[..., V_r]`
            (in rank order, any widths); labels count over all columns and are the same on all
            ranks. Results are bit-identical on all ranks; each gets the gradient of its own
            columns. If one rank raises, all do. See `rpo_kernels.distributed`.
        backend: `"auto"` (Triton on a GPU, PyTorch elsewhere), `"triton"` or `"torch"`.

    Returns:
        float32 in the shape of labels, in nats. A row's value does not depend on the rest of its
        batch. NaN and infinite logits behave as in `torch.log_softmax`; but on a GPU, a row whose
        largest logit exceeds 5.8e6 in magnitude and is not the label's gives NaN. Second
        derivatives raise.

    Raises:
        ValueError, TypeError: if an argument does not fit; checked before any launch.
    """
    return _checked(
        "token_logps",
        logits,
        labels,
        False,
        inplace_backward,
        process_group,
        backend,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
    )[0]


def token_logps_and_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`token_logps` and the entropy of each row, from the same pass; both are differentiable.

        H_t = -sum_v p_tv log p_tv,   dH/dz_tv = -p_tv (log p_tv + H_t)

    Entropies are in nats and 0 at ignored positions. Arguments and errors as there.
    """
    return _checked(
        "token_logps_and_entropy",
        logits,
        labels,
        True,
        inplace_backward,
        process_group,
        backend,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
    )


def _checked(
    op: str,
    logits: Tensor,
    labels: Tensor,
    entropy: bool,
    inplace: bool,
    process_group: ProcessGroup | None,
    backend: str,
    *,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    with distributed.raising_together(op, process_group=process_group):
        logits, process_group = distributed.local_logits(op, logits, process_group)
        vocab_ranks = distributed.group_name(op, process_group)
        checks.check_logits(
            op, logits, labels, ignore_index, inplace, is_shard=process_group is not None
        )
        transform = LogitTransform.of(op, temperature, logit_scale, softcap, ignore_index)
        checks.check_backend(op, backend)
        logps, _, entropies, _ = _token_logps.on(logits)(
            logits, labels, transform, entropy, inplace, backend, vocab_ranks
        )
    return logps, entropies


def rows_of(op: str, logits: Tensor) -> Tensor:
    """View logits `[..., V]` as `[outer, inner, V]`."""
    dims = logits.dim()
    if dims == 3:
        return logits
    if dims <= 2:
        return logits.view(1, -1, logits.shape[-1]) if dims == 1 else logits[None]
    try:
        return logits.view(math.prod(logits.shape[:-2]), *logits.shape[-2:])
    except RuntimeError:
        raise ValueError(
            f"{op}: the leading dimensions of `logits` must collapse to two without a copy, got "
            f"shape {checks.shape_of(logits)} with strides {tuple(logits.stride())}; pass "
            "logits.contiguous()"
        ) from None


def flat(x: Tensor) -> Tensor:
    """Return `[N]`, contiguous for the kernels: a reshape may be a strided view."""
    return (x if x.dim() == 1 else x.reshape(-1)).contiguous()


def shard_of(
    op: str,
    vocab_ranks: str,
    columns: int,
    labels: Tensor,
    ignore_index: int,
    check: Callable[[], None],
    **facts: object,
) -> distributed.Shard | None:
    """Return this rank's shard of the vocabulary, or None without ranks.

    All ranks compare their arguments; labels are checked against all columns.
    """
    if vocab_ranks:
        facts["the number of `labels`"] = labels.numel()
        facts["`ignore_index`"] = ignore_index
        facts["the values of `labels` (their checksum)"] = distributed.digest(labels)
    widths = distributed.agree(op, vocab_ranks, columns, facts, check)
    shard = distributed.Shard.of(vocab_ranks, widths) if vocab_ranks else None
    checks.check_label_values(
        op, labels, columns if shard is None else shard.vocabulary, ignore_index
    )
    return shard


class RowPass(NamedTuple):
    """Rows of logits and the function that reads them."""

    rows: Tensor  # [outer, inner, V]
    labels: Tensor  # [N]; on a shard, relative to its first column
    forward: Callable  # vocabulary_forward, combined over ranks: (rows, labels, transform, entropy)


def row_pass(
    op: str,
    logits: Tensor,
    labels: Tensor,
    transform: LogitTransform,
    backend: str,
    vocab_ranks: str,
    check: Callable[[], None] = lambda: None,
    **facts: object,
) -> RowPass:
    """Check values on all ranks, and return the rows with the function that reads them."""
    choose = functools.partial(module_of, op, backend, logits.device)
    if not vocab_ranks:
        rows = rows_of(op, logits)
        check()
        checks.check_label_values(op, labels, logits.shape[-1], transform.ignore_index)
        return RowPass(rows, flat(labels), choose("vocabulary_forward").vocabulary_forward)

    def check_all() -> None:
        rows_of(op, logits)
        check()

    facts |= {name: x for name, x in transform._asdict().items() if name != "ignore_index"}
    shard = shard_of(
        op, vocab_ranks, logits.shape[-1], labels, transform.ignore_index, check_all, **facts
    )
    assert shard is not None  # there are ranks
    labels, forward = (
        shard.labels(labels, transform.ignore_index),
        functools.partial(shard.forward, choose),
    )
    return RowPass(rows_of(op, logits), labels, forward)


def _forward(
    logits: Tensor,
    labels: Tensor,
    transform: LogitTransform,
    entropy: bool,
    inplace: bool,
    backend: str,
    vocab_ranks: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-probabilities, logsumexps `[2, N]`, entropies, and a shard's labels."""
    op = "token_logps_and_entropy" if entropy else "token_logps"
    read = row_pass(op, logits, labels, transform, backend, vocab_ranks, entropy=entropy)
    logps, lse, entropies = read.forward(read.rows, read.labels, transform, entropy)
    entropies = entropies.view(labels.shape) if entropy else logps.new_empty(0)
    return (
        logps.view(labels.shape),
        lse,
        entropies,
        read.labels if vocab_ranks else labels.new_empty(0),
    )


def _fake_forward(*inputs: Any) -> tuple[Tensor, ...]:
    logits, labels, _, entropy, *_, vocab_ranks = inputs
    logps = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    entropies, shard_labels = (
        labels.shape if entropy else (0,),
        labels.numel() if vocab_ranks else 0,
    )
    return (
        logps,
        logps.new_empty(2, labels.numel()),
        logps.new_empty(entropies),
        labels.new_empty(shard_labels),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, labels, ctx.transform, ctx.entropy, ctx.inplace, ctx.backend, vocab_ranks = inputs
    logps, lse, entropies, shard_labels = output
    if vocab_ranks:
        labels, ctx.transform = (
            shard_labels,
            ctx.transform._replace(ignore_index=distributed.IGNORED),
        )
    ctx.save_for_backward(logits, labels, logps, lse, entropies if ctx.entropy else None)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, shard_labels, *(() if ctx.entropy else (entropies,)))


def _backward(
    ctx: Any, dlogps: Tensor | None, _: None, dentropies: Tensor | None, __: None
) -> tuple[Tensor | None]:
    if ctx.inplace:
        only_once("token_logps", ctx)
    logits, labels, logps, lse, entropies = ctx.saved_tensors
    if dlogps is None and dentropies is None:
        return (None,)
    coef = torch.zeros_like(logps) if dlogps is None else dlogps
    entropies = None if dentropies is None else entropies
    read = labels, logps, lse, coef, None, entropies, dentropies, ctx.transform, ctx.backend
    return (dlogits_of(ctx.inplace, logits, *read),)


_token_logps = Operator("token_logps", 1, _forward, _fake_forward, _setup_context, _backward)


# ---- gradients of logits -------------------------------------------------------------------------


def dlogits_of(inplace: bool, logits: Tensor, *read: object) -> Tensor:
    """Return the gradient of the logits, in new memory or over the logits.

    `read` are the other arguments of `_dlogits`.
    """
    with torch.no_grad():
        if inplace:
            _dlogits_inplace_op.on(logits)(logits, *read)
            dlogits = logits.detach()
        else:
            dlogits = _dlogits_op.on(logits)(logits, *read)
    return once_differentiable(dlogits, logits, *(x for x in read if isinstance(x, Tensor)))


def _aligned_as(logits: Tensor) -> Tensor:
    """Allocate dlogits whose rows are aligned to 16 bytes as those of the logits are.

    So both are accessed 16 bytes at a time, for example for `logits[:, :-1]` with an odd V.
    Contiguous if the logits are; otherwise padded by at most 15 bytes at the end of each dimension.
    """
    unit, size, strides = 16 // logits.element_size(), logits.shape[-1], [1]
    for n, stride in zip(logits.shape[-2::-1], logits.stride()[-2::-1]):
        strides.append(size + (stride - size) % unit)
        size += strides[-1] * max(n - 1, 0)
    return logits.new_empty_strided(logits.shape, strides[::-1])


def _dlogits(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    lse: Tensor,
    coef: Tensor,
    upstream: Tensor | None,
    entropies: Tensor | None,
    entropy_coef: Tensor | None,
    transform: LogitTransform,
    backend: str,
) -> Tensor:
    out = _aligned_as(logits)
    _write_dlogits(
        out, logits, labels, logps, lse, coef, upstream, entropies, entropy_coef, transform, backend
    )
    return out


def _dlogits_inplace(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    lse: Tensor,
    coef: Tensor,
    upstream: Tensor | None,
    entropies: Tensor | None,
    entropy_coef: Tensor | None,
    transform: LogitTransform,
    backend: str,
) -> None:
    _write_dlogits(
        logits,
        logits,
        labels,
        logps,
        lse,
        coef,
        upstream,
        entropies,
        entropy_coef,
        transform,
        backend,
    )
    torch.autograd.graph.increment_version(logits)


def _write_dlogits(
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    lse: Tensor,
    coef: Tensor,
    upstream: Tensor | None,
    entropies: Tensor | None,
    entropy_coef: Tensor | None,
    transform: LogitTransform,
    backend: str,
) -> None:
    op = "vocabulary_backward"
    if entropies is not None and entropy_coef is not None:
        entropies, entropy_coef = flat(entropies), flat(entropy_coef)
    rows = rows_of(op, logits)
    module_of(op, backend, logits.device, "vocabulary_backward").vocabulary_backward(
        rows,
        flat(labels),
        flat(logps),
        lse,
        flat(coef),
        transform,
        rows if out is logits else rows_of(op, out),
        entropies=entropies,
        entropy_coef=entropy_coef,
        upstream=upstream,
    )


_dlogits_op = Operator("vocabulary_backward", 8, _dlogits, lambda logits, *_: _aligned_as(logits))
_dlogits_inplace_op = Operator(
    "vocabulary_backward_", 8, _dlogits_inplace, lambda *_: None, mutates=("logits",)
)
