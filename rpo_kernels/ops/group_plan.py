"""The plan of ``linear_rpo_loss``: whole groups at a time, from logits to gradients, before their chunk is gone.

A group's coefficients are known as soon as its own tokens are done. So whole groups share a chunk of logits: GEMM, vocabulary
forward, group pass, vocabulary backward in place, and the two gradient GEMMs. Gradients are ready with the loss; its backward
only scales them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import checks
from ..distributed import digest
from ..objectives import RPOObjective
from .autograd import once_differentiable, only_once
from .gradients import Gradients, empty_gradients
from .head import Chunks, Head, Leaves, Options, Scored
from .linear_checks import shard_of_head
from .merged import Context
from .preference import Segments, group_pass
from .scaling import require_one, scale_
from .units import Unit, pack_groups


@torch.library.custom_op("rpo_kernels::linear_rpo_loss", mutates_args=("weight_grad",))
def forward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    weight_grad: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    rewards: Tensor | None,
    ref_logps: Tensor | None,
    ref_weights: Tensor | None,
    cu_groups: Tensor | None,
    normalizer: Tensor | None,
    group_size: int,
    objective: str,
    mean: bool,
    backend: str,
    counts: Sequence[int] | None,
    needs: Sequence[bool],
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    workspace_bytes: int,
    group: str = "",
    reduce_dhidden: bool = True,
    context_group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, losses, [5, S] as of the group pass, lengths, and the gradients of the leaves for an upstream gradient of 1)."""
    op = "linear_rpo_loss"
    if weight_grad is not None and needs[1] and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{op}: `weight_grad` must be None under activation checkpointing, whose second forward would add the gradient again"
        )
    options = Options(temperature, logit_scale, softcap, ignore_index, compute_dtype, logits_dtype, workspace_bytes, backend,
                      group, reduce_dhidden)  # fmt: skip
    leaves = Leaves(hidden, weight, bias, lora_hidden, lora_weight)
    N, device = labels.numel(), hidden.device
    S = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    spec = RPOObjective.from_spec(objective)
    facts = {"`counts`": counts, "gradients": needs, "`objective`": objective, "`group_size`": group_size}
    facts |= {"the values of `cu_seqlens` and `cu_groups` (their checksum)": digest(cu_seqlens, cu_groups) if group else 0}
    shard = shard_of_head(op, options, hidden, weight, labels, lambda: checks.check_group_values(
        op, device, spec, S, N, cu_seqlens, cu_groups, rewards, ref_weights, normalizer), **facts)  # fmt: skip
    head = Head(op, weight, bias, options, lora_weight, shard)
    ref_head = head if ref_weight is None else Head(op, ref_weight, ref_bias, options, shard=shard)

    # The one look at the device: tokens of each sequence, and ragged groups' boundaries.
    flat_labels = labels.reshape(-1)
    scored = (flat_labels != ignore_index).double()
    lengths = Segments(S, cu_seqlens).sum(scored.view(labels.shape)).int()
    bounds = list(range(0, S + 1, group_size)) if cu_groups is None else None
    if counts is None:
        looked = (lengths if cu_groups is None else torch.cat([lengths, cu_groups])).tolist()
        counts, bounds = looked[:S], bounds or looked[S:]
    else:
        counts = list(counts)
        bounds = bounds or cu_groups.tolist()
        # Elsewhere wrong counts leave units whose offsets do not partition their tokens: the group pass makes NaN of those.
        if device.type == "cpu" and counts != (true := lengths.tolist()):
            raise ValueError(f"{op}: `counts` must be the scored tokens of each sequence, {true[:16]}; got {counts[:16]}")
    # Here, with values at hand on any device: bad offsets of the whole would be good ones of its units.
    if bounds[0] != 0 or bounds[-1] != S or any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"{op}: `cu_groups` must begin at 0, not decrease, and end at {S}, the sequences; got {bounds[:16]}")
    if any(count < 0 for count in counts):
        raise ValueError(f"{op}: `cu_seqlens` must begin at 0, not decrease, and end at {N}, the number of tokens")
    context = None
    if context_group:
        facts = {"gradients": needs, "`objective`": objective, "`reduction`": mean, "`group_size`": group_size}
        facts |= {"whether `ref_hidden` is given": ref_hidden is not None, "how logits are made": str((*options[:-3], head.widest))}
        facts |= {"the values of what belongs to sequences and groups (their checksum)": digest(
            cu_groups, rewards, normalizer, ref_weights)}  # fmt: skip
        context = Context(op, context_group, counts, N, ref_logps, device, facts)
    # Units are the same on all ranks that hold tokens of the sequences.
    most_counts, whole_lengths = (counts, lengths) if context is None else (context.most, context.lengths)
    n = sum(counts)
    rows = head.labelled(Scored.of(hidden, labels, options, n, lora_hidden))
    ref_rows = None if ref_hidden is None else Scored.of(ref_hidden, labels, options, n)
    cu_tokens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    ref_per_token = ref_rows is not None
    if ref_rows is not None:
        ref_logps = torch.empty((1, n), dtype=torch.float32, device=device)
    elif ref_logps is not None and (ref_logps.shape[1] == N if context is None else context.ref_per_token):
        ref_logps, ref_per_token = ref_logps[:, rows.index], True

    # Which groups count does not depend on the log-probabilities: one group pass over zeros settles the normalisers.
    _, _, (*_, role), _, _ = group_pass(
        op, torch.zeros(S, device=device), None, 0, S, whole_lengths, None, rewards, None, None, cu_groups, None,
        group_size, _dry(spec).spec, False, backend,
    )  # fmt: skip
    chosen = role == 2
    counted = chosen.sum()
    sft_share = (counted / torch.where(chosen, whole_lengths, 0).sum().clamp(min=1)).float()
    if normalizer is None and mean:
        normalizer = counted.clamp(min=1).float()
    if context is not None and device.type != "cpu":
        one = torch.ones((), device=device) if normalizer is None else normalizer
        normalizer = torch.where((context.by_rank[context.group.rank()] == lengths).all(), one, torch.nan)

    training = any(needs)
    most = Chunks.capacity(options, head.widest)
    sizes = [sum(most_counts[a:b]) for a, b in itertools.pairwise(bounds)]
    largest = max((size for size in sizes if size <= most), default=0) if training else 0
    chunks = Chunks.plan(head, sum(most_counts), largest, Gradients.keep_dlogits(needs))
    units = [Unit(slice(0, len(sizes)), slice(0, S), slice(0, n))]
    if training:
        units = pack_groups(counts, bounds, chunks.logits, most_counts)
    scale = _gradient_scale(spec, normalizer, device) if compute_dtype == torch.float16 else None
    gradients = Gradients(head, leaves, needs, chunks, n, weight_grad, scale=scale, early=True) if training else None
    scratch = head.buffer(0 if training and head.in_place else min(chunks.logits, n), logits_dtype)
    logps = torch.empty(n, dtype=torch.float32, device=device)
    outputs = []
    for unit in units:
        resident = training and unit.size <= chunks.logits
        parts = [
            slice(t, min(t + chunks.logits, unit.tokens.stop)) for t in range(unit.tokens.start, unit.tokens.stop, chunks.logits)
        ]
        lses = []
        for part in parts:
            chunk, size = rows.part(part), part.stop - part.start
            out = gradients.slot(size) if training and head.in_place else scratch[:size]
            if ref_rows is not None:
                ref_logps[0, part] = ref_head.forward(ref_head.logits(ref_rows.part(part), out), chunk.labels)[0]
            logits = head.shown(head.logits(chunk, out), chunk.labels)
            logps[part], lse, _ = head.forward(logits, chunk.labels)
            lses.append(lse)
        *results, coef = _group_pass_of(
            unit, op, logps, rows.labels, head.transform["ignore_index"], cu_tokens, rewards, ref_logps, ref_per_token,
            ref_weights, cu_groups, normalizer, group_size, objective, backend, sft_share, context,
        )  # fmt: skip
        outputs.append(results)
        for part, lse in zip(parts, lses) if training else ():
            chunk, size = rows.part(part), part.stop - part.start
            slot = gradients.slot(size)
            if head.in_place:
                logits = slot if resident else head.logits(chunk, slot)
            elif not resident:
                logits = head.logits(chunk, scratch[:size])
            local = slice(part.start - unit.tokens.start, part.stop - unit.tokens.start)
            head.backward(logits, chunk.labels, logps[part], lse, coef[local], slot, upstream=scale)
            gradients.add(chunk, slot)
    loss, losses, by_sequence = (list(x) for x in zip(*outputs))
    logits = out = slot = scratch = None  # the workspace is free before gradients are rounded
    return (
        torch.stack(loss).sum(),
        torch.cat(losses),
        torch.cat(by_sequence, 1),
        whole_lengths,
        *(gradients.finish() if training else empty_gradients(leaves, needs, weight_grad, early=True)),
    )


def _gradient_scale(objective: RPOObjective, normalizer: Tensor | None, device: torch.device) -> Tensor:
    """A power of two that brings the coefficients, about beta / normalizer, near 1 where fp16 would lose them.

    A loss scaler acts too late: gradients are ready before its factor arrives.
    """
    divisor = torch.ones((), device=device) if normalizer is None else normalizer
    return torch.ldexp(torch.ones_like(divisor), (divisor / (objective.beta * objective.scale)).log2().clamp(-24, 24).round())


def _dry(objective: RPOObjective) -> RPOObjective:
    """The objective without a reference: same targets, same groups counted."""
    return replace(objective, reference="none")


def _group_pass_of(unit, op, logps, labels, ignore_index, cu_tokens, rewards, ref_logps, ref_per_token, ref_weights, cu_groups,
                   normalizer, group_size, objective, backend, sft_share, context):  # fmt: skip
    """The group pass over the tokens of one unit: loss, losses, [5, S], and dL/dlogps of its tokens (on this rank)."""
    s, g, t = unit.sequences, unit.groups, unit.tokens
    logps, labels, cu_seqlens = logps[t], labels[t], cu_tokens[s.start : s.stop + 1] - t.start
    if ref_logps is not None:
        ref_logps = ref_logps[:, t if ref_per_token else s].contiguous()
    if context is not None:
        merged = context.merged(s)
        logps, cu_seqlens = merged.merge(logps), merged.offsets
        labels = torch.full_like(logps, ignore_index + 1, dtype=torch.int64)  # all are scored
        if ref_logps is not None and ref_per_token:
            ref_logps = merged.merge(ref_logps)
    if ref_weights is not None and ref_weights.dim() == 2:
        ref_weights = ref_weights[:, g]
    if cu_groups is not None:
        cu_groups = cu_groups[g.start : g.stop + 1] - s.start
    loss, losses, by_sequence, _, coef = group_pass(
        op, logps, labels, ignore_index, s.stop - s.start, None, cu_seqlens,
        None if rewards is None else rewards[s], ref_logps, ref_weights, cu_groups, normalizer, group_size, objective, False,
        backend, sft_share, ref_per_token,
    )  # fmt: skip
    return loss, losses, by_sequence, coef if context is None else coef[merged.mine]


@forward_op.register_fake
def _(hidden, weight, bias, lora_hidden, lora_weight, weight_grad, labels, cu_seqlens, rh, rw, rb, rewards, rl, rws, cu_groups,
      normalizer, group_size, objective, mean, backend, counts, needs, *_):  # fmt: skip
    S = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    G = S // group_size if cu_groups is None else cu_groups.shape[0] - 1
    floats = torch.empty((), dtype=torch.float32, device=hidden.device)
    return (
        floats,
        floats.new_empty(G),
        floats.new_empty(5, S),
        floats.new_empty(S, dtype=torch.int32),
        *empty_gradients(Leaves(hidden, weight, bias, lora_hidden, lora_weight), needs, weight_grad, early=True),
    )


def with_gradients(loss: Tensor, leaves: Leaves, gradients: list[Tensor], needs: list[bool], taken: bool, backend: str) -> Tensor:
    """The loss, whose backward brings each leaf that needs one its gradient, which is ready.

    ``taken`` if a buffer has taken in that of the weight, which fixes the upstream gradient to 1.
    """
    wanted = [(leaf, gradient) for leaf, gradient, need in zip(leaves, gradients, needs) if need]
    return _attach_op(loss, *(list(x) for x in zip(*wanted)), int(needs[0]) if taken else -1, backend)


@torch.library.custom_op("rpo_kernels::with_gradients", mutates_args=())
def _attach_op(loss: Tensor, leaves: Sequence[Tensor], gradients: Sequence[Tensor], taken: int, backend: str) -> Tensor:
    """``taken``: which leaf a buffer has taken in the gradient of, or -1."""
    return loss.clone()


@_attach_op.register_fake
def _(loss, leaves, gradients, taken, backend):
    return torch.empty_like(loss)


def _setup_context(ctx, inputs, output):
    _, leaves, gradients, ctx.taken, ctx.backend = inputs
    ctx.count = len(leaves)
    ctx.save_for_backward(*leaves, *gradients)


def _backward(ctx, dloss):
    only_once("linear_rpo_loss", ctx)
    saved = ctx.saved_tensors  # once: checkpoints refuse a second look
    leaves, gradients = saved[: ctx.count], saved[ctx.count :]
    if ctx.taken >= 0:
        dloss = require_one(dloss)
    results = []
    for i, (leaf, gradient) in enumerate(zip(leaves, gradients)):
        if i == ctx.taken:  # a leaf's shape tells nothing: ZeRO-3 empties parameters after the forward
            results.append(None)
            continue
        scale_(gradient, dloss, ctx.backend)
        # a detached twin may become a parameter's .grad without a copy
        results.append(once_differentiable(gradient.detach().to(leaf.dtype), *leaves))
    return None, results, [None] * ctx.count, None, None


_attach_op.register_autograd(_backward, setup_context=_setup_context)
