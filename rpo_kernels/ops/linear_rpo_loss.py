"""The RPO loss from hidden states and an lm_head: three GEMMs, whatever the length of a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import checks, distributed
from ..inputs import Groups, Sequences, groups_of
from ..objectives import RPOObjective
from .gradients import (
    Gradients,
    Kept,
    LiveReference,
    Store,
    empty_gradients,
    over_tokens,
    spared_bytes,
)
from .head import Head, Leaves, OnLogits, Options, Rows, shown_to
from .linear_checks import (
    check_counts,
    check_leaves,
    check_live_reference,
    check_on_logits,
    check_weight_grad,
    local_leaves,
    local_reference,
    options_of,
    shard_of_head,
)
from .linear_token_logps import late_chunks, scored_index, settle
from .operator import Operator, once_differentiable, only_once, require_one, scale_
from .output import RPOOutput
from .preference import output
from .windows import Batch, Layout, Reference


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
    """RPO loss of groups of responses, from hidden states: :func:`rpo_loss` of a linear head
    without the logits.

        z = hidden weight^T + lora_hidden lora_weight^T + bias
        l_i = sum_t log softmax(z_it)[y_it],   s_i = a_i (l_i - lref_i)
        L = mean over groups of D[s || t]

    Costs, in GEMMs of the scored rows with the head: 3 with a trainable head, 2 with a frozen one,
    1 without gradients. Whole groups are processed together, as many as the workspace holds; of a
    group of its own that is larger, the logits of the rows beyond are computed once more for
    dweight (docs/memory.md). Gradients are ready when the forward returns; the backward scales them
    by its upstream gradient, unless that is 1.

    Args:
        hidden: ``[S, T, H]``, or packed ``[N, H]`` with cu_seqlens; float32, float16 or bfloat16.
            Under autocast the GEMMs run in its dtype.
        weight: ``[V, H]``, the lm_head; bias ``[V]`` or None.
        lora_hidden, lora_weight: as for :func:`linear_token_logps`.
        weight_grad: ``[V, H]``, float, that dweight is added to while the forward runs, whether or
            not a backward follows (weight.grad, or a trainer's fp32 buffer); autograd then brings
            weight none. Avoids a ``[V, H]`` temporary; hooks of weight see nothing. The upstream
            gradient of ``loss`` must be 1 then (scale by ``normalizer``): another raises on a CPU
            and makes other gradients NaN on a GPU. Raises inside a checkpoint, which runs the
            forward twice.
        labels: ``[S, T]`` or ``[N]``, aligned with hidden; rows that hold ignore_index take part in
            no GEMM.
        rewards, objective, ref_weights, group_size, cu_groups, reduction, normalizer: as for
            :func:`preference_loss`. ``reduction="none"`` has a free upstream gradient, so that its
            gradients are computed in the backward, at the same cost.
        ref_logps: ``[S]``, or per token in the shape of labels; with a leading ``R`` for several
            references.
        ref_hidden: instead, the reference's hidden states ``[S, T, H']`` or ``[N, H']``, processed
            beside the policy's, one GEMM more; equal inputs give log-ratios of exactly 0.
        ref_weight, ref_bias: the reference's head ``[V, H']``, ``[V]``; weight and bias if None.
        cu_seqlens: ``[S+1]`` int32 boundaries of packed sequences.
        temperature, logit_scale, softcap, ignore_index, backend: as for :func:`token_logps`.
        logits_dtype, workspace_bytes, on_logits (the policy's logits): as for
            :func:`linear_token_logps`.
        counts: scored tokens of each sequence, if the caller knows them: avoids the only
            synchronisation with the device (with cu_groups on a GPU one remains). Wrong ones raise
            on a CPU; on a GPU they give a NaN loss, unless they change no chunk.
        process_group, reduce_dhidden: as for :func:`linear_token_logps`, ref_weight and ref_bias
            sharded alike. The ranks hold the same batch and return the same loss.
        context_group: ranks that hold parts of the same sequences (context parallelism): each
            passes its own tokens of every sequence, perhaps none (hidden, labels, cu_seqlens,
            counts and per-token references); what belongs to sequences and groups is the same on
            all. A few numbers per token travel, for the group pass; all return the same loss.
            Gradients are those of the rank's own tokens: the gradient of a parameter is the sum
            over the ranks, not their mean. Another group than process_group; with both, its ranks
            hold the same columns.

    Returns:
        :class:`RPOOutput`; float32. Gradients flow to hidden, weight, bias, lora_hidden and
        lora_weight; sums over chunks are fp32, rounded once. A second backward (but of
        ``reduction="none"``) and second derivatives raise.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before anything is launched.
    """
    op = "linear_rpo_loss"
    with distributed.raising_together(op, process_group=process_group, context_group=context_group):
        checks.check_objective(op, objective)
        leaves = Leaves(hidden, weight, bias, lora_hidden, lora_weight)
        leaves, process_group, reduce_dhidden = local_leaves(
            op, leaves, weight_grad, process_group, reduce_dhidden
        )
        check_on_logits(op, on_logits, process_group)
        reference = local_reference(
            op, leaves.hidden, Reference(ref_hidden, ref_weight, ref_bias), process_group
        )
        vocab_ranks = distributed.group_name(op, process_group)
        context = distributed.group_name(op, context_group, "context_group")
        if context and context == vocab_ranks:
            raise ValueError(
                f"{op}: `context_group` must be another group than `process_group`, got "
                f"{context_group!r} twice"
            )
        check_leaves(op, leaves, labels, ignore_index, is_shard=bool(vocab_ranks))
        check_weight_grad(op, weight_grad, leaves.weight)
        options = options_of(
            op,
            leaves.hidden,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            ignore_index=ignore_index,
            logits_dtype=logits_dtype,
            workspace_bytes=workspace_bytes,
            backend=backend,
            vocab_ranks=vocab_ranks,
            reduce_dhidden=reduce_dhidden,
        )
        sequences = Sequences.of(op, "labels", labels, cu_seqlens)
        counts = check_counts(op, counts, sequences.number)
        reference = check_live_reference(
            op, objective, leaves, labels, ignore_index, ref_logps, reference, bool(vocab_ranks)
        )
        groups = Groups.of(
            op,
            objective,
            sequences,
            tuple(labels.shape),
            leaves.hidden.device,
            rewards=rewards,
            ref_logps=ref_logps,
            ref_weights=ref_weights,
            group_size=group_size,
            cu_groups=cu_groups,
            reduction=reduction,
            normalizer=normalizer,
            is_live=reference.hidden is not None,
        )
        needs = leaves.needs()
        data = Batch(labels, sequences, groups, reference, counts, context)
        with shown_to(op, on_logits):
            if reduction == "none" and any(needs):
                size = labels.numel() if counts is None else sum(counts)
                call = _per_group.on(hidden)
                losses, by_sequence, lengths, *_ = call(
                    *leaves,
                    weight_grad,
                    data,
                    needs,
                    -1 if call is _per_group.eager else size,
                    options,
                )
                return output(reduction, losses, losses, by_sequence, lengths, cu_groups)
            detached = (None if x is None else x.detach() for x in leaves)
            loss, losses, by_sequence, lengths, *gradients = _loss.on(hidden)(
                *detached, weight_grad, data, needs, options
            )
        if any(needs):
            loss = _ready.on(loss)(
                *leaves, loss, Leaves(*gradients), needs, weight_grad is not None, backend
            )
    return output(reduction, loss, losses, by_sequence, lengths, cu_groups)


# ---- gradients with the loss: mean and sum -------------------------------------------------------


def _begin(
    op: str, leaves: Leaves, data: Batch, needs: list[bool], options: Options
) -> tuple[Head, Layout, Rows, LiveReference | None]:
    """The head, where the batch's rows lie, the scored ones, and the reference that is evaluated
    beside them.
    """
    labels, sequences, groups = data.labels, data.sequences, data.groups
    facts = {
        "`counts`": data.counts,
        "gradients": needs,
        "`objective`": groups.objective.spec,
        "`group_size`": groups.group_size,
    }
    if options.vocab_ranks:
        digest = distributed.digest(sequences.cu_seqlens, groups.cu_groups)
        facts["the values of `cu_seqlens` and `cu_groups` (their checksum)"] = digest
    check = lambda: groups.check_values(op, labels.device, sequences, labels.numel())
    shard = shard_of_head(op, options, leaves, labels, check, **facts)
    head = Head(op, leaves, options, shard)
    layout = Layout(op, data, options, needs, head.widest)
    index = scored_index(op, labels, options.transform.ignore_index, sum(layout.counts))
    rows, reference = head.rows(leaves, labels, index), None
    hidden, weight, bias = data.reference
    if hidden is not None:
        ref_leaves = Leaves(
            hidden,
            *((leaves.weight, leaves.bias) if weight is None else (weight, bias)),
            None,
            None,
        )
        ref_head = Head(op, ref_leaves, options, shard)
        logps = torch.empty(rows.size, dtype=torch.float32, device=head.device)
        reference = LiveReference(ref_head, ref_head.rows(ref_leaves, labels, index), logps)
    layout.refer(index, None if reference is None else reference.logps)
    return head, layout, rows, reference


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    weight_grad: Tensor | None,
    data: Batch,
    needs: list[bool],
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, losses, ``[5, S]`` of the group pass, lengths, and the gradients of the leaves for an
    upstream gradient of 1.
    """
    op, leaves, training = (
        "linear_rpo_loss",
        Leaves(hidden, weight, bias, lora_hidden, lora_weight),
        any(needs),
    )
    if weight_grad is not None and needs[1] and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{op}: `weight_grad` must be None under activation checkpointing, whose second "
            "forward would add the gradient again"
        )
    head, layout, rows, reference = _begin(op, leaves, data, needs, options)
    keeps, most = over_tokens(needs), sum(layout.most)
    chunks = head.plan(most, keeps, spared_bytes(leaves, needs, options, weight_grad))
    # under a frozen head nothing waits: one window, unless ranks sum it while the next one runs
    bounded = keeps or bool(options.vocab_ranks)
    windows = layout.windows(chunks.waiting if bounded else max(most, 1))
    store = Store.new(head, rows, needs, chunks)
    if training:
        once = len(windows) == 1 and most <= chunks.waiting
        gradients = Gradients(
            leaves, needs, rows, options, once=once, weight_grad=weight_grad, early=True
        )
    results = []
    for window in windows:
        store.read(window.rows, reference)
        *result, coef = layout.group_pass(window, store.logps)
        results.append(result)
        if training:
            store.settle(window.rows, coef, gradients)
    loss, losses, by_sequence = (list(x) for x in zip(*results))
    lengths = layout.lengths
    del store  # the workspace is free before gradients are rounded
    return (
        torch.stack(loss).sum(),
        torch.cat(losses),
        torch.cat(by_sequence, 1),
        lengths,
        *(
            gradients.finish()
            if training
            else empty_gradients(leaves, needs, weight_grad, early=True)
        ),
    )


def _fake_forward(*inputs: Any) -> tuple[Tensor, ...]:
    *tensors, weight_grad, data, needs, _ = inputs
    leaves = Leaves(*tensors)
    x, S = leaves.hidden.new_empty((), dtype=torch.float32), data.sequences.number
    losses, lengths = x.new_empty(data.groups.number(S)), x.new_empty(S, dtype=torch.int32)
    return (
        x,
        losses,
        x.new_empty(5, S),
        lengths,
        *empty_gradients(leaves, needs, weight_grad, early=True),
    )


# An operator that writes to weight_grad has no derivative: the loss gets its from `_ready`.
_loss = Operator(
    "linear_rpo_loss", 6, _forward, _fake_forward, mutates=("weight_grad",), waits=True
)


def _ready_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    loss: Tensor,
    gradients: Leaves,  # of each leaf; empty where there is none
    needs: list[bool],
    weight_grad: bool,
    backend: str,
) -> Tensor:
    """The loss; its backward brings the leaves the gradients that are ready, of the weight none if
    ``weight_grad`` has it.
    """
    return loss.clone()


def _ready_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *leaves, _, gradients, ctx.needs, ctx.weight_grad, ctx.backend = inputs
    ctx.save_for_backward(*leaves, *gradients)


def _ready_backward(ctx: Any, dloss: Tensor) -> tuple:
    only_once("linear_rpo_loss", ctx)
    saved = ctx.saved_tensors  # once: checkpoints refuse a second look
    leaves, gradients = saved[:5], saved[5:]
    results: list[Tensor | None] = []
    with torch.no_grad():
        if ctx.weight_grad and ctx.needs[1]:
            dloss = require_one.on(dloss)(dloss)
        for i, (leaf, gradient) in enumerate(zip(leaves, gradients)):
            # a leaf's shape tells nothing: ZeRO-3 empties parameters after the forward
            if not ctx.needs[i] or (i == 1 and ctx.weight_grad):
                results.append(None)
                continue
            scale_.on(gradient)(gradient, dloss, ctx.backend)
            # detached, it may become a .grad without a copy
            results.append(gradient.detach().to(leaf.dtype))
    return (*(None if x is None else once_differentiable(x, *leaves) for x in results), None)


_ready = Operator(
    "linear_rpo_loss_ready",
    6,
    _ready_forward,
    lambda *inputs: torch.empty_like(inputs[5]),
    _ready_setup,
    _ready_backward,
)


# ---- gradients in the backward: one loss per group -----------------------------------------------


def _forward_per_group(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    weight_grad: Tensor | None,
    data: Batch,
    needs: list[bool],
    size: int,
    options: Options,
) -> tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
]:
    """losses, ``[5, S]`` and lengths of the group pass; of each row dL/dlogp and its group; and the
    fields of :class:`Kept`.
    """
    op, leaves = "linear_rpo_loss", Leaves(hidden, weight, bias, lora_hidden, lora_weight)
    head, layout, rows, reference = _begin(op, leaves, data, needs, options)
    n = rows.size if size < 0 else size
    chunks = late_chunks(op, leaves, needs, options, head.widest, n, weight_grad)
    (window,) = layout.windows(max(1, sum(layout.most)))
    store = Store.new(head, rows, needs, chunks, size=n)
    store.read(window.rows, reference)
    _, losses, by_sequence, coef = layout.group_pass(window, store.logps)
    S, groups = data.sequences.number, data.groups
    group = groups_of(S, groups.group_size, groups.cu_groups, head.device)
    group = group.long().repeat_interleave(layout.offsets.diff(), output_size=rows.size)
    coef, group = (torch.nn.functional.pad(x, (0, n - rows.size)) for x in (coef, group))
    return (losses, by_sequence, layout.lengths, coef, group, *store.kept())


def _fake_per_group(*inputs: Any) -> tuple[Tensor, ...]:
    *tensors, weight_grad, data, needs, size, options = inputs
    leaves = Leaves(*tensors)
    chunks = late_chunks(
        "linear_rpo_loss", leaves, needs, options, leaves.weight.shape[0], size, weight_grad
    )
    x, S = leaves.hidden.new_empty(size, dtype=torch.float32), data.sequences.number
    per_sequence = x.new_empty(5, S), x.new_empty(S, dtype=torch.int32)
    kept = Store.fake_kept(leaves, needs, options, chunks, size, False)
    return (
        x.new_empty(data.groups.number(S)),
        *per_sequence,
        x,
        x.new_empty(size, dtype=torch.int64),
        *kept,
    )


def _setup_per_group(ctx: Any, inputs: tuple, output: tuple) -> None:
    *leaves, ctx.weight_grad, _, _, _, ctx.options = inputs
    ctx.save_for_backward(*leaves, *output[3:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _backward_per_group(ctx: Any, dlosses: Tensor | None, *_: Tensor | None) -> tuple:
    if dlosses is None:
        return (None,) * 6
    saved = ctx.saved_tensors
    leaves, coef, group, kept = saved[:5], saved[5], saved[6], Kept(*saved[7:])
    needs = list(ctx.needs_input_grad[:5])
    with torch.no_grad():
        coef = coef * dlosses[group]
        gradients = settle.on(leaves[0])(
            ctx.weight_grad, *leaves, kept, coef, None, False, needs, ctx.options
        )
    if ctx.weight_grad is not None:
        needs[1] = False
    return (
        *(once_differentiable(g, *leaves) if need else None for g, need in zip(gradients, needs)),
        None,
    )


_per_group = Operator(
    "linear_rpo_loss_per_group",
    6,
    _forward_per_group,
    _fake_per_group,
    _setup_per_group,
    _backward_per_group,
    waits=True,
)
