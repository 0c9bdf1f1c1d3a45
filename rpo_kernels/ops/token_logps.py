"""Token log-probabilities (and entropies) from logits: one pass over the vocabulary forward, one backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import checks, distributed
from ..backend import engine
from .autograd import once_differentiable, only_once, operator


@distributed.agreeing
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

        lp_t = log softmax(z_t)[y_t],   z = softcap tanh(logit_scale x / softcap) / temperature
                                        (without softcap: z = logit_scale x / temperature)
        dL/dx_t = dL/dlp_t (onehot(y_t) - softmax(z_t)) dz/dx

    Args:
        logits: ``[..., V]`` float32, float16 or bfloat16; any strides on the leading dimensions, last one contiguous. A DTensor
            that is sharded in the last dimension brings its process group.
        labels: ``[...]`` int64 or int32, aligned with logits: ``labels[t]`` is the token that position t predicts
            (:func:`shift_labels`). On a CPU a label outside [0, V) raises; on a GPU its log-probability is NaN.
        temperature: divides the logits, > 0.
        logit_scale: multiplies the logits, > 0.
        softcap: bound of the logits (Gemma 2), > 0, or None.
        ignore_index: label of a position that is not scored: its logits are not read, its log-probability is 0 and its
            gradient 0.
        inplace_backward: write the gradient over the logits. No other operation may need them then; autograd raises if one
            does, and on a second backward. Under ``torch.compile`` the graph's own memory planning decides.
        process_group: ranks that hold the vocabulary together: logits are this rank's columns ``[..., V_r]`` (in rank order; any
            widths), labels count over all columns and are the same on all ranks. Results agree bit for bit on all of them; each
            gets the gradient of its own columns. A rank that raises makes all raise. See :mod:`rpo_kernels.distributed`.
        backend: ``"auto"`` (Triton on a GPU, PyTorch elsewhere), ``"triton"`` or ``"torch"``.

    Returns:
        float32 in the shape of labels, in nats. A row's value does not depend on its batch. NaN and infinite logits behave
        as in :func:`torch.log_softmax`; on a GPU a row whose largest logit is beyond 5.8e6 in size, and not the label's, is NaN.
        Second derivatives raise.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before anything is launched.
    """
    logps, _ = _token_logps("token_logps", logits, labels, temperature, logit_scale, softcap, ignore_index,
                            inplace_backward, False, process_group, backend)  # fmt: skip
    return logps


@distributed.agreeing
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
    """:func:`token_logps` and the entropy of each row, from the same pass; both differentiable.

        H_t = -sum_v p_tv log p_tv,   dH/dz_tv = -p_tv (log p_tv + H_t),   0 at ignored positions; nats

    Arguments and errors as there.
    """
    return _token_logps("token_logps_and_entropy", logits, labels, temperature, logit_scale, softcap, ignore_index,
                        inplace_backward, True, process_group, backend)  # fmt: skip


def _token_logps(
    op, logits, labels, temperature, logit_scale, softcap, ignore_index, inplace, entropy, process_group, backend
):  # fmt: skip
    logits, process_group = distributed.local_logits(op, logits, process_group)
    group = distributed.group_name(op, process_group)
    checks.check_logits(op, logits, labels, ignore_index, inplace, is_shard=bool(group))
    checks.check_transform(op, temperature, logit_scale, softcap)
    checks.check_backend(op, backend)
    logps, _, entropies, _ = _forward_op(
        logits, labels, float(temperature), float(logit_scale), float(softcap or 0.0), ignore_index, entropy, inplace, backend,
        group,
    )  # fmt: skip
    return logps, entropies


def rows_of(op: str, logits: Tensor) -> Tensor:
    """Logits ``[..., V]`` as a view ``[outer, inner, V]``."""
    dims = logits.dim()
    if dims == 3:
        return logits
    if dims <= 2:
        return logits.view(1, -1, logits.shape[-1]) if dims == 1 else logits[None]
    try:
        return logits.view(math.prod(logits.shape[:-2]), *logits.shape[-2:])
    except RuntimeError:
        raise ValueError(
            f"{op}: the leading dimensions of `logits` must collapse to two without a copy, got shape "
            f"{checks.shape_of(logits)} with strides {tuple(logits.stride())}; pass logits.contiguous()"
        ) from None


def flat(x: Tensor) -> Tensor:
    """``[N]`` and contiguous, as kernels read it: a reshape may be a strided view."""
    return (x if x.dim() == 1 else x.reshape(-1)).contiguous()


def shard_of(
    op: str, group: str, columns: int, labels: Tensor, ignore_index: int, check: Callable[[], None], **facts: object
) -> distributed.Shard | None:
    """This rank's shard of the vocabulary, all ranks of the group agreeing; labels checked against all of its columns."""
    if group:
        facts["the number of `labels`"] = labels.numel()
        facts["`ignore_index`"] = ignore_index
        facts["the values of `labels` (their checksum)"] = distributed.digest(labels)
    widths = distributed.agree(op, group, columns, facts, check)
    shard = distributed.Shard.of(group, widths) if group else None
    checks.check_label_values(op, labels, columns if shard is None else shard.vocabulary, ignore_index)
    return shard


def vocabulary_forward(
    op, logits, labels, temperature, logit_scale, softcap, ignore_index, entropy, backend, group, check=lambda: None, **facts
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Flat log-probabilities, logsumexps and if asked entropies of every row, by the chosen engine, from flat labels; and labels
    that count from this rank's first column, none without a group."""
    if not group:
        rows = rows_of(op, logits)
        check()
        checks.check_label_values(op, labels, logits.shape[-1], ignore_index)
        logps, lse, entropies = engine(op, backend, logits.device, "vocabulary").vocabulary_forward(
            rows, labels, temperature=temperature, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index,
            entropy=entropy,
        )  # fmt: skip
        return logps, lse, entropies, labels.new_empty(0)

    transform = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}

    def check_all():
        rows_of(op, logits)
        check()

    shard = shard_of(op, group, logits.shape[-1], labels, ignore_index, check_all, **transform, entropy=entropy, **facts)
    local = shard.labels(labels, ignore_index)
    choose = functools.partial(engine, op, backend, logits.device)
    return (*shard.forward(choose, rows_of(op, logits), local, entropy=entropy, **transform), local)


@operator("token_logps")
def _forward_op(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    entropy: bool,
    inplace: bool,
    backend: str,
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "token_logps_and_entropy" if entropy else "token_logps"
    logps, lse, entropies, local_labels = vocabulary_forward(
        op, logits, flat(labels), temperature, logit_scale, softcap, ignore_index, entropy, backend, group
    )
    entropies = entropies.view(labels.shape) if entropy else logps.new_empty(0)
    return logps.view(labels.shape), lse, entropies, local_labels


@_forward_op.register_fake
def _(logits, labels, temperature, logit_scale, softcap, ignore_index, entropy, inplace, backend, group=""):
    logps = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    lse = logps.new_empty(2, labels.numel())
    return logps, lse, logps.new_empty(labels.shape if entropy else (0,)), labels.new_empty(labels.numel() if group else 0)


def _setup_context(ctx, inputs, output):
    logits, labels, *ctx.options, ctx.entropy, ctx.inplace, ctx.backend, group = inputs
    logps, lse, entropies, local_labels = output
    if group:
        labels, ctx.options[-1] = local_labels, distributed.IGNORED
    ctx.save_for_backward(logits, labels, logps, lse, entropies if ctx.entropy else None)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, local_labels)


def _backward(ctx, dlogps, _, dentropies, __):
    if ctx.inplace:
        only_once("token_logps", ctx)
    logits, labels, logps, lse, entropies = ctx.saved_tensors
    if dlogps is None and dentropies is None:
        return (None,) * 10
    coef = torch.zeros_like(logps) if dlogps is None else dlogps.contiguous()
    dentropies = dentropies.contiguous() if dentropies is not None and ctx.entropy else None
    dlogits = dlogits_of(
        ctx.inplace, logits, labels, logps, lse, coef, None, entropies if dentropies is not None else None, dentropies,
        *ctx.options, ctx.backend,
    )  # fmt: skip
    return (dlogits, *(None,) * 9)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def dlogits_of(inplace: bool, logits: Tensor, *args) -> Tensor:
    """Gradient of the logits, in memory of its own or over the logits."""
    if torch.is_grad_enabled():  # someone means to differentiate the gradient
        with torch.no_grad():
            dlogits = dlogits_of(inplace, logits, *args)
        return once_differentiable(dlogits, logits, *args)
    if not inplace:
        return _backward_op(logits, *args)
    _backward_inplace_op(logits, *args)
    return logits.detach()


def _backward_into(
    out, logits, labels, logps, lse, coef, upstream, entropies, entropy_coef, temperature, logit_scale, softcap, ignore_index,
    backend,
) -> None:  # fmt: skip
    op = "vocabulary_backward"
    if entropy_coef is not None:
        entropies, entropy_coef = flat(entropies), flat(entropy_coef)
    rows = rows_of(op, logits)
    engine(op, backend, logits.device, "vocabulary").vocabulary_backward(
        rows, flat(labels), flat(logps), lse, flat(coef), entropies=entropies, entropy_coef=entropy_coef, upstream=upstream,
        temperature=temperature, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index,
        out=rows if out is logits else rows_of(op, out),
    )  # fmt: skip


@operator("vocabulary_backward")
def _backward_op(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    lse: Tensor,
    coef: Tensor,
    upstream: Tensor | None,
    entropies: Tensor | None,
    entropy_coef: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    backend: str,
) -> Tensor:
    out = logits.new_empty(logits.shape)
    _backward_into(out, logits, labels, logps, lse, coef, upstream, entropies, entropy_coef, temperature, logit_scale,
                   softcap, ignore_index, backend)  # fmt: skip
    return out


@_backward_op.register_fake
def _(logits, *args):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@operator("vocabulary_backward_", mutates_args=("logits",))
def _backward_inplace_op(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    lse: Tensor,
    coef: Tensor,
    upstream: Tensor | None,
    entropies: Tensor | None,
    entropy_coef: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    backend: str,
) -> None:
    _backward_into(logits, logits, labels, logps, lse, coef, upstream, entropies, entropy_coef, temperature, logit_scale,
                   softcap, ignore_index, backend)  # fmt: skip


@_backward_inplace_op.register_fake
def _(logits, *args):
    return None
