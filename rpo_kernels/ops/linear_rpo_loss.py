"""The RPO loss from hidden states and an lm_head: three GEMMs for groups of any length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import distributed, group_checks
from ..inputs import Groups, Sequences, groups_of
from ..sums import AnyObjective
from .gradients import (
    Gradients,
    Kept,
    LiveReference,
    Store,
    empty_gradients,
    over_tokens,
    spared_bytes,
)
from .group_pass import Losses, fake_losses
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
    objective: AnyObjective,
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
    group_weights: Tensor | None = None,
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
    """RPO loss of groups of responses, from hidden states.

    Equal to `rpo_loss` of the logits of a linear head, which are never held as a whole.

        z = hidden weight^T + lora_hidden lora_weight^T + bias
        l_i = sum_t log softmax(z_it)[y_it],   s_i = a_i (l_i - lref_i)
        L = mean over groups of D[s || t]

    Cost, in GEMMs of the scored rows with the head: 3 with a trainable head, 2 with a frozen one, 1
    without gradients. Whole groups are processed together, as many as the workspace holds; if a
    single group is larger, the logits of the rows that do not fit are recomputed for dweight
    (docs/memory.md). Gradients are ready when the forward returns; the backward only multiplies
    them by its upstream gradient, unless that is 1.

    `rewards`, `objective`, `ref_weights`, `group_size`, `cu_groups`, `reduction`, `normalizer`
    and `group_weights` are those of `preference_loss`; `temperature`, `logit_scale`, `softcap`,
    `ignore_index` and `backend` those of `token_logps`; `lora_hidden`, `lora_weight`,
    `logits_dtype`, `workspace_bytes`, `on_logits` (it gets the policy's logits), `process_group`
    and `reduce_dhidden` those of `linear_token_logps`.

    Args:
        hidden: `[S, T, H]`, or packed `[N, H]` with cu_seqlens; float32, float16 or bfloat16. Under
            autocast the GEMMs run in its dtype.
        weight: `[V, H]`, the lm_head.
        labels: `[S, T]` or `[N]`, aligned with hidden; rows labelled ignore_index take part in no
            GEMM.
        bias: `[V]` or None.
        weight_grad: `[V, H]`, float, a buffer that dweight is added to during the forward, whether
            or not a backward follows (weight.grad, or a trainer's fp32 buffer). Autograd then
            returns no gradient for weight: this avoids a `[V, H]` temporary, and hooks of weight
            are not called. The upstream gradient of `loss` must be 1 (scale with `normalizer`);
            another one raises on a CPU and makes the other gradients NaN on a GPU. Raises under
            activation checkpointing, which runs the forward twice. With `reduction="none"` the
            backward adds to it, for any upstream gradient.
        ref_logps: `[S]`, or per token in the shape of labels (which decides where both are the
            same); with a leading `R` for several references.
        ref_hidden: the reference's hidden states `[S, T, H']` or `[N, H']`, in place of ref_logps;
            they are processed along with the policy's, at one more GEMM. Equal inputs give
            log-ratios of exactly 0.
        ref_weight: `[V, H']`, the reference's head; None for the policy's. Sharded like weight.
        ref_bias: `[V]` or None, the reference's bias; the policy's if neither is given.
        cu_seqlens: `[S+1]` int32 boundaries of packed sequences.
        counts: number of scored tokens of each sequence, if the caller knows it: avoids the only
            synchronisation with the device (with cu_groups on a GPU one remains). Wrong counts
            raise on a CPU; on a GPU they give a NaN loss, unless they change no chunk.
        context_group: ranks that hold parts of the same sequences (context parallelism). Each
            passes its own tokens of every sequence, possibly none (hidden, labels, cu_seqlens,
            counts, per-token references); arguments per sequence and per group are the same on all.
            Only a few numbers per token are exchanged, for the group pass, and all ranks return the
            same loss. Each rank gets the gradients of its own tokens: the gradient of a parameter
            is the sum over the ranks, not the mean. Must differ from process_group; if both are
            given, the ranks of context_group hold the same columns.

    Returns:
        `RPOOutput`, float32. Gradients flow to hidden, weight, bias, lora_hidden and lora_weight;
        they are summed over chunks in fp32 and rounded once. A second backward raises (except with
        `reduction="none"`, where gradients are computed in the backward, at the same cost), and so
        do second derivatives. With a process_group, the ranks pass the same batch and return the
        same loss.

    Raises:
        ValueError, TypeError: if an argument does not fit; checked before any launch.
    """
    op = "linear_rpo_loss"
    with distributed.raising_together(op, process_group=process_group, context_group=context_group):
        whole = group_checks.check_objective(op, objective)
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
            op, whole, leaves, labels, ignore_index, ref_logps, reference, bool(vocab_ranks)
        )
        groups = Groups.of(
            op,
            whole,
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
            group_weights=group_weights,
            is_live=reference.hidden is not None,
        )
        needs = leaves.needs()
        data = Batch(labels, sequences, groups, reference, counts, context)
        with shown_to(op, on_logits):
            if reduction == "none" and any(needs):
                size = labels.numel() if counts is None else sum(counts)
                call = _per_group.on(hidden)
                results = call(
                    *leaves,
                    weight_grad,
                    data,
                    needs,
                    -1 if call is _per_group.eager else size,
                    options,
                )
                return output(reduction, Losses(*results[:4]), results[4], groups)
            detached = (None if x is None else x.detach() for x in leaves)
            results = _loss.on(hidden)(*detached, weight_grad, data, needs, options)
            loss, *others = results[:4]
        if any(needs):
            loss = _ready.on(loss)(
                *leaves, loss, Leaves(*results[5:]), needs, weight_grad is not None, backend
            )
    return output(reduction, Losses(loss, *others), results[4], groups)


# ---- gradients with the loss: mean and sum -------------------------------------------------------


def _begin(
    op: str, leaves: Leaves, data: Batch, needs: list[bool], options: Options
) -> tuple[Head, Layout, Rows, LiveReference | None]:
    """Prepare the head, the layout of the batch, its scored rows and the reference."""
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the fields of `Losses`, lengths, and the leaves' gradients.

    The gradients are those for an upstream gradient of 1.
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
    # with a frozen head nothing waits: a single window, unless ranks sum its dhidden during the
    # next one
    bounded = keeps or bool(options.vocab_ranks)
    windows = layout.windows(chunks.waiting if bounded else max(most, 1))
    store = Store.new(head, rows, needs, chunks)
    if training:
        once = len(windows) == 1 and most <= chunks.waiting
        gradients = Gradients(
            leaves, needs, rows, options, once=once, weight_grad=weight_grad, early=True
        )
    results: list[Losses] = []
    for window in windows:
        store.read(window.rows, reference)
        result, coef = layout.group_pass(window, store.logps)
        results.append(result)
        if training:
            store.settle(window.rows, coef, gradients)
    loss, losses, part_losses, by_sequence = zip(*results)
    del store  # frees the workspace before gradients are rounded
    return (
        torch.stack(loss).sum(),
        torch.cat(losses),
        torch.cat(part_losses, 1),
        torch.cat(by_sequence, 1),
        layout.lengths,
        *(
            gradients.finish()
            if training
            else empty_gradients(leaves, needs, weight_grad, early=True)
        ),
    )


def _fake_forward(*inputs: Any) -> tuple[Tensor, ...]:
    *tensors, weight_grad, data, needs, _ = inputs
    leaves, S = Leaves(*tensors), data.sequences.number
    losses = fake_losses(leaves.hidden, data.groups, S)
    return (
        *losses,
        losses.loss.new_empty(S, dtype=torch.int32),
        *empty_gradients(leaves, needs, weight_grad, early=True),
    )


# it writes to weight_grad and has no derivative: `_ready` attaches the gradients to the loss
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
    """Return the loss; its backward returns the ready gradients (none if in `weight_grad`)."""
    return loss.clone()


def _ready_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *leaves, _, gradients, ctx.needs, ctx.weight_grad, ctx.backend = inputs
    ctx.save_for_backward(*leaves, *gradients)


def _ready_backward(ctx: Any, dloss: Tensor) -> tuple:
    only_once("linear_rpo_loss", ctx)
    saved = ctx.saved_tensors  # read once: checkpointing allows no second access
    leaves, gradients = saved[:5], saved[5:]
    results: list[Tensor | None] = []
    with torch.no_grad():
        if ctx.weight_grad and ctx.needs[1]:
            dloss = require_one.on(dloss)(dloss)
        for i, (leaf, gradient) in enumerate(zip(leaves, gradients)):
            # no check of the leaf's shape: ZeRO-3 empties parameters after the forward
            if not ctx.needs[i] or (i == 1 and ctx.weight_grad):
                results.append(None)
                continue
            scale_.on(gradient)(gradient, dloss, ctx.backend)
            # detached, so that it may become .grad without a copy
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
    Tensor,
    Tensor,
]:
    """Return the fields of `Losses`, lengths, dL/dlogp and the group of each row, and `Kept`."""
    op, leaves = "linear_rpo_loss", Leaves(hidden, weight, bias, lora_hidden, lora_weight)
    head, layout, rows, reference = _begin(op, leaves, data, needs, options)
    n = rows.size if size < 0 else size
    chunks = late_chunks(op, leaves, needs, options, head.widest, n, weight_grad)
    (window,) = layout.windows(max(1, sum(layout.most)))
    store = Store.new(head, rows, needs, chunks, size=n)
    store.read(window.rows, reference)
    losses, coef = layout.group_pass(window, store.logps)
    S, groups = data.sequences.number, data.groups
    group = groups_of(S, groups.group_size, groups.cu_groups, head.device)
    group = group.long().repeat_interleave(layout.offsets.diff(), output_size=rows.size)
    coef, group = (torch.nn.functional.pad(x, (0, n - rows.size)) for x in (coef, group))
    return (*losses, layout.lengths, coef, group, *store.kept())


def _fake_per_group(*inputs: Any) -> tuple[Tensor, ...]:
    *tensors, weight_grad, data, needs, size, options = inputs
    leaves = Leaves(*tensors)
    chunks = late_chunks(
        "linear_rpo_loss", leaves, needs, options, leaves.weight.shape[0], size, weight_grad
    )
    x, S = leaves.hidden.new_empty(size, dtype=torch.float32), data.sequences.number
    kept = Store.fake_kept(leaves, needs, options, chunks, size, False)
    return (
        *fake_losses(leaves.hidden, data.groups, S),
        x.new_empty(S, dtype=torch.int32),
        x,
        x.new_empty(size, dtype=torch.int64),
        *kept,
    )


def _setup_per_group(ctx: Any, inputs: tuple, output: tuple) -> None:
    *leaves, ctx.weight_grad, _, _, _, ctx.options = inputs
    ctx.save_for_backward(*leaves, *output[5:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[0], *output[2:])


def _backward_per_group(ctx: Any, _: None, dlosses: Tensor | None, *__: None) -> tuple:
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
