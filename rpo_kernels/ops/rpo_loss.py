"""The RPO loss from logits: two kernel launches in the forward, one in the backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import checks, distributed, group_checks
from ..inputs import Groups, LogitTransform, Sequences, groups_of
from ..sums import AnyObjective
from .group_pass import Losses, fake_losses, group_pass
from .operator import Operator, only_once
from .output import RPOOutput
from .preference import output
from .token_logps import dlogits_of, flat, row_pass


def rpo_loss(
    logits: Tensor,
    labels: Tensor,
    rewards: Tensor | None,
    objective: AnyObjective,
    *,
    ref_logps: Tensor | None = None,
    ref_weights: Tensor | None = None,
    group_size: int | None = None,
    cu_groups: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    group_weights: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> RPOOutput:
    """RPO loss of groups of responses, from their logits.

        l_i = sum_t log softmax(z_it)[y_it],   s_i = a_i (l_i - lref_i)
        L = mean over groups of D[s || t]
        dL/dz_it = dL/dl_i (onehot(y_it) - softmax(z_it))

    Equal to `preference_loss` of `sequence_logps` of `token_logps`, with one pass over the
    vocabulary in each direction and one group pass, which leaves one coefficient per token for the
    backward.

    `rewards`, `objective`, `ref_weights`, `group_size`, `cu_groups`, `reduction`, `normalizer`
    and `group_weights` are those of `preference_loss`; `temperature`, `logit_scale`, `softcap`,
    `ignore_index`, `inplace_backward`, `process_group` and `backend` those of `token_logps`.

    Args:
        logits: `[S, T, V]`, or packed `[N, V]` with cu_seqlens; float32, float16 or bfloat16.
        labels: `[S, T]` or `[N]`, aligned with logits; ignore_index where a token is not scored
            (prompt, padding).
        ref_logps: per sequence `[S]`, or per token in the shape of labels (more accurate:
            differences are summed, not sums subtracted; it decides where both shapes are the
            same); with a leading `R` for objectives with several references.
        cu_seqlens: `[S+1]` int32 boundaries of packed sequences, as in FlashAttention.

    Returns:
        `RPOOutput`, float32. Second derivatives raise. With a process_group, the ranks pass the
        same batch and return the same loss.

    Raises:
        ValueError, TypeError: if an argument does not fit; checked before any launch.
    """
    op = "rpo_loss"
    with distributed.raising_together(op, process_group=process_group):
        logits, process_group = distributed.local_logits(op, logits, process_group)
        vocab_ranks = distributed.group_name(op, process_group)
        whole = group_checks.check_objective(op, objective)
        checks.check_logits(
            op, logits, labels, ignore_index, inplace_backward, is_shard=process_group is not None
        )
        transform = LogitTransform.of(op, temperature, logit_scale, softcap, ignore_index)
        checks.check_backend(op, backend)
        sequences = Sequences.of(op, "labels", labels, cu_seqlens)
        groups = Groups.of(
            op,
            whole,
            sequences,
            tuple(labels.shape),
            logits.device,
            rewards=rewards,
            ref_logps=ref_logps,
            ref_weights=ref_weights,
            group_size=group_size,
            cu_groups=cu_groups,
            reduction=reduction,
            normalizer=normalizer,
            group_weights=group_weights,
        )
        call = _rpo_loss.on(logits)
        *results, lengths, _, _, _, _ = call(
            logits, labels, sequences, groups, transform, inplace_backward, backend, vocab_ranks
        )
    return output(reduction, Losses(*results), lengths, groups)


def _forward(
    logits: Tensor,
    labels: Tensor,
    sequences: Sequences,
    groups: Groups,
    transform: LogitTransform,
    inplace: bool,
    backend: str,
    vocab_ranks: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of `Losses`, lengths, and what the backward reads of the tokens.

    These are coefficients, log-probabilities, logsumexps, and a shard's labels.
    """
    op = "rpo_loss"
    check = functools.partial(groups.check_values, op, logits.device, sequences, labels.numel())
    read = row_pass(
        op, logits, labels, transform, backend, vocab_ranks, check, objective=groups.objective.spec
    )
    logps, lse, _ = read.forward(read.rows, read.labels, transform, False)
    results, lengths, coef = group_pass(
        op,
        backend,
        logps,
        flat(labels),
        None,
        sequences,
        groups.parts(),
        transform.ignore_index,
    )
    shard_labels = read.labels if vocab_ranks else labels.new_empty(0)
    return (*results, lengths, coef, logps, lse, shard_labels)


def _fake_forward(*inputs: Any) -> tuple[Tensor, ...]:
    logits, labels, sequences, groups, *_, vocab_ranks = inputs
    S, N = sequences.number, labels.numel()
    losses = fake_losses(logits, groups, S)
    x = losses.loss
    per_token = (
        x.new_empty(N),
        x.new_empty(N),
        x.new_empty(2, N),
        labels.new_empty(N if vocab_ranks else 0),
    )
    return (*losses, x.new_empty(S, dtype=torch.int32), *per_token)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, labels, sequences, groups, ctx.transform, ctx.inplace, ctx.backend, vocab_ranks = inputs
    coef, logps, lse, shard_labels = output[5:]
    if vocab_ranks:
        labels, ctx.transform = (
            shard_labels,
            ctx.transform._replace(ignore_index=distributed.IGNORED),
        )
    ctx.number, ctx.group_size = sequences.number, groups.group_size
    ctx.save_for_backward(logits, labels, logps, lse, coef, sequences.cu_seqlens, groups.cu_groups)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])


def _backward(
    ctx: Any, dloss: Tensor | None, dlosses: Tensor | None, *_: None
) -> tuple[Tensor | None]:
    if ctx.inplace:
        only_once("rpo_loss", ctx)
    logits, labels, logps, lse, coef, cu_seqlens, cu_groups = ctx.saved_tensors
    upstream = dloss
    if dlosses is not None:  # reduction="none": one factor per group
        sequence = Sequences(ctx.number, cu_seqlens).of_token(coef.shape[0], coef.device)
        group = groups_of(ctx.number, ctx.group_size, cu_groups, coef.device)
        coef, upstream = coef * dlosses[group][sequence], None
    elif dloss is None:
        return (None,)
    return (
        dlogits_of(
            ctx.inplace,
            logits,
            labels,
            logps,
            lse,
            coef,
            upstream,
            None,
            None,
            ctx.transform,
            ctx.backend,
        ),
    )


_rpo_loss = Operator("rpo_loss", 1, _forward, _fake_forward, _setup_context, _backward)
