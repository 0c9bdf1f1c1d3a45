"""The RPO loss straight from logits: two launches forward, one backward."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import checks, distributed
from ..objectives import RPOObjective
from .autograd import only_once, operator
from .output import RPOOutput
from .preference import Segments, group_pass, groups_of, output, prepare
from .token_logps import dlogits_of, flat, vocabulary_forward


@distributed.agreeing
def rpo_loss(
    logits: Tensor,
    labels: Tensor,
    rewards: Tensor | None,
    objective: RPOObjective,
    *,
    ref_logps: Tensor | None = None,
    ref_weights: Tensor | None = None,
    group_size: int | None = None,
    cu_groups: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> RPOOutput:
    """RPO loss of groups of responses, from their logits.

        l_i = sum_t log softmax(z_it)[y_it],   s_i = a_i (l_i - lref_i),   L = mean over groups of D[s || t]
        dL/dz_it = dL/dl_i (onehot(y_it) - softmax(z_it))

    Equal to :func:`preference_loss` of :func:`sequence_logps` of :func:`token_logps`, in one vocabulary pass each way and one
    group pass, which leaves a single coefficient per token for the backward.

    Args:
        logits: ``[S, T, V]``, or packed ``[N, V]`` with cu_seqlens; float32, float16 or bfloat16.
        labels: ``[S, T]`` or ``[N]``, aligned with logits; ignore_index where a token is not scored (prompt, padding).
        rewards, objective, ref_weights, group_size, cu_groups, reduction, normalizer: as for :func:`preference_loss`.
        ref_logps: per sequence ``[S]``, or per token in the shape of labels (more accurate: the difference is summed, not
            the sums subtracted); with a leading ``R`` for objectives with several references.
        cu_seqlens: ``[S+1]`` int32 boundaries of packed sequences, as in FlashAttention.
        temperature, logit_scale, softcap, ignore_index, inplace_backward, process_group, backend: as for :func:`token_logps`.
            The ranks of a process group hold the same batch and return the same loss.

    Returns:
        :class:`RPOOutput`; float32. Second derivatives raise.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before anything is launched.
    """
    op = "rpo_loss"
    logits, process_group = distributed.local_logits(op, logits, process_group)
    group = distributed.group_name(op, process_group)
    checks.check_objective(op, objective)
    checks.check_logits(op, logits, labels, ignore_index, inplace_backward, is_shard=bool(group))
    checks.check_transform(op, temperature, logit_scale, softcap)
    S = Segments.of(op, "labels", labels, cu_seqlens).sequences
    inputs = prepare(op, objective, logits.device, S, [(S,), tuple(labels.shape)], rewards, ref_logps, ref_weights,
                     cu_seqlens, group_size, cu_groups, reduction, normalizer, backend)  # fmt: skip
    loss, losses, by_sequence, lengths, *_ = _forward_op(
        logits, labels, cu_seqlens, *inputs, float(temperature), float(logit_scale), float(softcap or 0.0), ignore_index,
        inplace_backward, group,
    )  # fmt: skip
    return output(reduction, loss, losses, by_sequence, lengths, cu_groups)


@operator("rpo_loss")
def _forward_op(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    rewards: Tensor | None,
    ref_logps: Tensor | None,
    ref_weights: Tensor | None,
    cu_groups: Tensor | None,
    normalizer: Tensor | None,
    group_size: int,
    objective: str,
    mean: bool,
    backend: str,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    inplace: bool,
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    op, N, S = "rpo_loss", labels.numel(), labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check = functools.partial(
        checks.check_group_values, op, logits.device, RPOObjective.from_spec(objective), S, N, cu_seqlens, cu_groups, rewards,
        ref_weights, normalizer,
    )  # fmt: skip
    flat_labels = flat(labels)
    logps, lse, _, local_labels = vocabulary_forward(
        op, logits, flat_labels, temperature, logit_scale, softcap, ignore_index, False, backend, group, check, objective=objective
    )
    results = group_pass(
        op, logps, flat_labels, ignore_index, S, None, cu_seqlens, rewards, ref_logps, ref_weights, cu_groups,
        normalizer, group_size, objective, mean, backend,
        ref_per_token=ref_logps is not None and ref_logps.shape[1] == N,
    )  # fmt: skip
    return (*results, logps, lse, local_labels)


@_forward_op.register_fake
def _(logits, labels, cu_seqlens, rewards, ref_logps, ref_weights, cu_groups, normalizer, group_size, objective, mean, backend,
      temperature, logit_scale, softcap, ignore_index, inplace, group=""):  # fmt: skip
    S = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    G = S // group_size if cu_groups is None else cu_groups.shape[0] - 1
    floats = torch.empty((), dtype=torch.float32, device=logits.device)
    N = labels.numel()
    tokens = floats.new_empty(N), floats.new_empty(N), floats.new_empty(2, N), labels.new_empty(N if group else 0)
    return (floats, floats.new_empty(G), floats.new_empty(5, S), floats.new_empty(S, dtype=torch.int32), *tokens)


def _setup_context(ctx, inputs, output):
    logits, labels, cu_seqlens, _, _, _, cu_groups, _, ctx.group_size, _, _, ctx.backend, *ctx.options, ctx.inplace, group = inputs
    loss, losses, by_sequence, lengths, coef, logps, lse, local_labels = output
    if group:
        labels, ctx.options[-1] = local_labels, distributed.IGNORED
    ctx.save_for_backward(logits, labels, logps, lse, coef, cu_seqlens, cu_groups)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(by_sequence, lengths, coef, logps, lse, local_labels)


def _backward(ctx, dloss, dlosses, *_):
    if ctx.inplace:
        only_once("rpo_loss", ctx)
    logits, labels, logps, lse, coef, cu_seqlens, cu_groups = ctx.saved_tensors
    upstream = dloss
    if dlosses is not None:  # reduction "none": one factor per group
        token = torch.arange(coef.shape[0], device=coef.device, dtype=torch.int32)
        if cu_seqlens is None:
            sequence = token // max(logits.shape[-2], 1)
        else:
            sequence = torch.searchsorted(cu_seqlens[1:-1], token, right=True)
        S = logits.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        coef = coef * dlosses[groups_of(S, ctx.group_size, cu_groups, coef.device)][sequence]
        upstream = None
    elif dloss is None:
        return (None,) * 18
    dlogits = dlogits_of(ctx.inplace, logits, labels, logps, lse, coef, upstream, None, None, *ctx.options, ctx.backend)
    return (dlogits, *(None,) * 17)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
