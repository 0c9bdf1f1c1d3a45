"""The RPO loss from hidden states and an lm_head in three GEMMs, none of them a recomputation."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import checks, distributed
from ..objectives import RPOObjective
from .group_plan import forward_op, with_gradients
from .head import Leaves, OnLogits, shown_to
from .linear_checks import (
    check_counts,
    check_leaves,
    check_live_reference,
    check_on_logits,
    check_weight_grad,
    compute_dtype,
    local_leaves,
    options_of,
)
from .linear_token_logps import linear_token_logps
from .output import RPOOutput
from .preference import Segments, output, preference_loss, prepare, sequence_logps


@distributed.agreeing
def linear_rpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rewards: Tensor | None,
    objective: RPOObjective,
    *,
    bias: Tensor | None = None,
    lora_hidden: Tensor | None = None,
    lora_weight: Tensor | None = None,
    weight_grad: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
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
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    counts: Sequence[int] | None = None,
    on_logits: OnLogits = None,
    process_group: ProcessGroup | None = None,
    context_group: ProcessGroup | None = None,
    reduce_dhidden: bool = True,
    backend: str = "auto",
) -> RPOOutput:
    """RPO loss of groups of responses, from hidden states: :func:`rpo_loss` of a linear head without the logits.

        z = hidden weight^T + lora_hidden lora_weight^T + bias
        l_i = sum_t log softmax(z_it)[y_it],   s_i = a_i (l_i - lref_i),   L = mean over groups of D[s || t]

    Costs, in GEMMs of the scored rows with the head: 3 with a trainable head, 2 with a frozen one, 1 without gradients.
    Gradients are ready when the forward returns; the backward scales them by its upstream gradient, unless that is 1. A
    group whose logits exceed the workspace costs one GEMM more.

    Args:
        hidden: ``[S, T, H]``, or packed ``[N, H]`` with cu_seqlens; float32, float16 or bfloat16. Under autocast the GEMMs run
            in its dtype.
        weight: ``[V, H]``, the lm_head; bias ``[V]`` or None.
        lora_hidden, lora_weight: as for :func:`linear_token_logps`.
        weight_grad: ``[V, H]``, float, that dweight is added to while the forward runs, whether or not a backward follows
            (weight.grad, or a trainer's fp32 buffer); autograd then brings weight none. Spares a ``[V, H]`` temporary; hooks of
            weight see nothing. The upstream gradient of ``loss`` must be 1 then (scale by ``normalizer``): another raises on a CPU
            and makes other gradients NaN on a GPU. Raises inside a checkpoint, which runs the forward twice.
        labels: ``[S, T]`` or ``[N]``, aligned with hidden; rows that hold ignore_index take part in no GEMM.
        rewards, objective, ref_weights, group_size, cu_groups, reduction, normalizer: as for :func:`preference_loss`.
            ``reduction="none"`` has a free upstream gradient and costs what :func:`linear_token_logps` does.
        ref_logps: ``[S]``, or per token in the shape of labels; with a leading ``R`` for several references.
        ref_hidden: instead, the reference's hidden states ``[S, T, H']`` or ``[N, H']``, worked off beside the policy's, one GEMM
            more; equal inputs give log-ratios of exactly 0.
        ref_weight, ref_bias: the reference's head ``[V, H']``, ``[V]``; weight and bias if None.
        cu_seqlens: ``[S+1]`` int32 boundaries of packed sequences.
        temperature, logit_scale, softcap, ignore_index, backend: as for :func:`token_logps`.
        logits_dtype, workspace_bytes, on_logits (the policy's logits): as for :func:`linear_token_logps`.
        counts: scored tokens of each sequence, if the caller knows them: spares the one look at the device (with cu_groups on
            a GPU one remains). Wrong ones raise on a CPU; on a GPU they give a NaN loss, unless they change no chunk.
        process_group, reduce_dhidden: as for :func:`linear_token_logps`, ref_weight and ref_bias sharded alike. The ranks hold the
            same batch and return the same loss.
        context_group: ranks that hold parts of the same sequences (context parallelism): each passes its own tokens of every
            sequence, perhaps none (hidden, labels, cu_seqlens, counts and per-token references); what belongs to sequences and
            groups is the same on all. A few numbers per token travel, for the group pass; all return the same loss. Gradients are
            those of the rank's own tokens: the gradient of a parameter is the sum over the ranks, not their mean. Another group
            than process_group; with both, its ranks hold the same columns.

    Returns:
        :class:`RPOOutput`; float32. Gradients flow to hidden, weight, bias, lora_hidden and lora_weight; sums over chunks are
        fp32, rounded once. A second backward and second derivatives raise.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before anything is launched.
    """
    op = "linear_rpo_loss"
    checks.check_objective(op, objective)
    leaves = Leaves(hidden, weight, bias, lora_hidden, lora_weight)
    leaves, process_group, reduce_dhidden = local_leaves(op, leaves, weight_grad, process_group, reduce_dhidden)
    check_on_logits(op, on_logits, process_group)
    hidden, weight, bias, *_ = leaves
    ref_hidden, ref_weight, ref_bias = _local_reference(op, hidden, ref_hidden, ref_weight, ref_bias, process_group)
    group, context = distributed.group_name(op, process_group), distributed.group_name(op, context_group, "context_group")
    if context and context == group:
        raise ValueError(f"{op}: `context_group` must be another group than `process_group`, got {context_group!r} twice")
    check_leaves(op, leaves, labels, ignore_index, is_shard=bool(group))
    check_weight_grad(op, weight_grad, weight)
    options = options_of(op, hidden, temperature, logit_scale, softcap, ignore_index, logits_dtype, workspace_bytes, backend)
    S = Segments.of(op, "labels", labels, cu_seqlens).sequences
    counts = check_counts(op, counts, S)
    live_reference = check_live_reference(
        op, objective, hidden, weight, bias, labels, ignore_index, ref_logps, ref_hidden, ref_weight, ref_bias,
        bool(group),
    )  # fmt: skip
    placeholder = hidden.new_zeros(S, dtype=torch.float32) if ref_hidden is not None else ref_logps
    inputs = prepare(op, objective, hidden.device, S, [(S,), tuple(labels.shape)], rewards, placeholder, ref_weights, cu_seqlens,
                     group_size, cu_groups, reduction, normalizer, backend)  # fmt: skip
    if reduction == "none":
        if context and ref_logps is not None and tuple(ref_logps.shape[-labels.dim() :]) == tuple(labels.shape) == (S,):
            raise ValueError(
                f"{op}: `ref_logps` {checks.shape_of(ref_logps)} may be per token or per sequence where a rank of `context_group` "
                f"has S = {S} positions; pass `reduction` 'mean' or 'sum', or compose linear_token_logps and preference_loss"
            )
        return _composed(leaves, labels, rewards, objective, ref_logps, live_reference, ref_weights, group_size, cu_groups,
                         cu_seqlens, counts, weight_grad, on_logits, dict(
                             temperature=temperature, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index,
                             logits_dtype=logits_dtype, workspace_bytes=workspace_bytes, process_group=process_group,
                             reduce_dhidden=reduce_dhidden, backend=backend), context_group)  # fmt: skip
    if ref_weight is None and ref_bias is None:  # the policy's head serves both
        live_reference = (live_reference[0], None, None)
    needs = leaves.needs()
    with shown_to(op, on_logits):
        loss, losses, by_sequence, lengths, *gradients = forward_op(
            *(None if x is None else x.detach() for x in leaves), weight_grad, labels, cu_seqlens, *live_reference, *inputs,
            counts, needs, *options[:-1], group, reduce_dhidden, context,
        )  # fmt: skip
    if any(needs):
        loss = with_gradients(loss, leaves, gradients, needs, weight_grad is not None, backend)
    return output(reduction, loss, losses, by_sequence, lengths, cu_groups)


@torch.no_grad()
def _local_reference(op, hidden, ref_hidden, ref_weight, ref_bias, process_group) -> tuple:
    """The reference's tensors without DTensors."""
    if distributed.is_dtensor(ref_hidden):
        ref_hidden, _ = distributed.local_hidden(op, "ref_hidden", ref_hidden, None)
    named = {"ref_weight": ref_weight, "ref_bias": ref_bias}
    return ref_hidden, *(
        distributed.local_parameter(op, name, x, process_group, compute_dtype(hidden)) for name, x in named.items()
    )


def _composed(leaves, labels, rewards, objective, ref_logps, live, ref_weights, group_size, cu_groups, cu_seqlens, counts,
              weight_grad, on_logits, options, context_group) -> RPOOutput:  # fmt: skip
    """One loss per group: token log-probabilities, then the group pass, each with its own backward."""
    if counts is not None:
        options["count"] = sum(counts)
    hidden, weight, bias, lora_hidden, lora_weight = leaves
    logps = linear_token_logps(
        hidden, weight, labels, bias=bias, lora_hidden=lora_hidden, lora_weight=lora_weight, weight_grad=weight_grad,
        on_logits=on_logits, **options,
    )  # fmt: skip
    if live[0] is not None:
        with torch.no_grad():
            ref_logps = linear_token_logps(live[0], live[1], labels, bias=live[2], **options)
    sums = functools.partial(sequence_logps, cu_seqlens=cu_seqlens, process_group=context_group)
    lengths = sums((labels != options["ignore_index"]).float()).int()
    per_token = ref_logps is not None and ref_logps.shape[-labels.dim() :] == labels.shape
    if per_token:
        references = ref_logps.reshape(-1, *labels.shape)
        ref_logps = torch.stack([sums(r, labels=labels, ignore_index=options["ignore_index"]) for r in references])
        ref_logps = ref_logps if objective.reference in ("harmonic", "geometric") else ref_logps[0]
    return preference_loss(
        sums(logps), rewards, objective, ref_logps=ref_logps, ref_weights=ref_weights,
        lengths=lengths, group_size=group_size, cu_groups=cu_groups, reduction="none", backend=options["backend"],
    )  # fmt: skip
