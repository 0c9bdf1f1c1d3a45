"""The RPO loss from hidden states and an lm_head in three GEMMs, none of them a recomputation.

A group's coefficients are known as soon as its own tokens are done. So whole groups share a chunk of logits: GEMM, vocabulary
forward, group pass, vocabulary backward in place, and the two gradient GEMMs, before the chunk is gone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import checks
from ..objectives import RPOObjective
from .autograd import once_differentiable
from .head import Chunks, Gradients, Head, OnLogits, Options, Scored, shown_to
from .linear_checks import check_counts, check_linear, check_live_reference, options_of
from .linear_token_logps import linear_token_logps
from .output import RPOOutput
from .preference import Segments, group_pass, output, preference_loss, prepare, sequence_logps
from .scaling import scale_
from .units import Unit, pack_groups


def linear_rpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rewards: Tensor | None,
    objective: RPOObjective,
    *,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_weights: Tensor | None = None,
    group_size: int = 2,
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
    backend: str = "auto",
) -> RPOOutput:
    """RPO loss of groups of responses, from hidden states: :func:`rpo_loss` of ``hidden weight^T + bias`` without the logits.

        l_i = sum_t log softmax(z_it)[y_it],  z = hidden weight^T + bias,  s_i = a_i (l_i - lref_i),  L = mean of D[s || t]

    Costs, in GEMMs of the scored rows with the head: 3 with a trainable head, 2 with a frozen one, 1 without gradients.
    Gradients are ready when the forward returns; the backward scales them by its upstream gradient, unless that is 1. A
    group whose logits exceed the workspace costs one GEMM more.

    Args:
        hidden: ``[S, T, H]``, or packed ``[N, H]`` with cu_seqlens; float32, float16 or bfloat16. Under autocast the GEMMs run
            in its dtype.
        weight: ``[V, H]``, the lm_head; bias ``[V]`` or None.
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
            a GPU one remains). Wrong counts give a NaN loss.

    Returns:
        :class:`RPOOutput`; float32. Gradients flow to hidden, weight and bias; sums over chunks are fp32, rounded once. A second
        backward and second derivatives raise.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before anything is launched.
    """
    op = "linear_rpo_loss"
    checks.check_objective(op, objective)
    check_linear(op, hidden, weight, bias, labels, ignore_index)
    options = options_of(op, hidden, temperature, logit_scale, softcap, ignore_index, logits_dtype, workspace_bytes, backend)
    S = Segments.of(op, "labels", labels, cu_seqlens).sequences
    counts = check_counts(op, counts, S)
    live_reference = check_live_reference(
        op, objective, hidden, weight, bias, labels, ignore_index, ref_logps, ref_hidden, ref_weight, ref_bias
    )
    placeholder = hidden.new_zeros(S, dtype=torch.float32) if ref_hidden is not None else ref_logps
    inputs = prepare(op, objective, hidden.device, S, [(S,), tuple(labels.shape)], rewards, placeholder, ref_weights, cu_seqlens,
                     group_size, cu_groups, reduction, normalizer, backend)  # fmt: skip
    if reduction == "none":
        return _composed(hidden, weight, labels, rewards, objective, bias, ref_logps, live_reference, ref_weights, group_size,
                         cu_groups, cu_seqlens, ignore_index, counts, dict(
                             temperature=temperature, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index,
                             logits_dtype=logits_dtype, workspace_bytes=workspace_bytes, backend=backend), on_logits)  # fmt: skip
    grad = torch.is_grad_enabled()
    needs = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    with shown_to(op, on_logits):
        loss, losses, by_sequence, lengths, *_ = _forward_op(
            hidden, weight, bias, labels, cu_seqlens, *live_reference, *inputs, counts, *needs, *options[:-1]
        )
    return output(reduction, loss, losses, by_sequence, lengths, cu_groups)


def _composed(hidden, weight, labels, rewards, objective, bias, ref_logps, live, ref_weights, group_size, cu_groups, cu_seqlens,
              ignore_index, counts, options, on_logits) -> RPOOutput:  # fmt: skip
    """One loss per group: token log-probabilities, then the group pass, each with its own backward."""
    if counts is not None:
        options["count"] = sum(counts)
    logps = linear_token_logps(hidden, weight, labels, bias=bias, on_logits=on_logits, **options)
    if live[0] is not None:
        with torch.no_grad():
            ref_logps = linear_token_logps(live[0], live[1], labels, bias=live[2], **options)
    scored = (labels != ignore_index).double()
    S = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    lengths = Segments(S, cu_seqlens).sum(scored).int()
    per_token = ref_logps is not None and ref_logps.shape[-labels.dim() :] == labels.shape
    if per_token:
        references = ref_logps.reshape(-1, *labels.shape)
        ref_logps = torch.stack([sequence_logps(r, cu_seqlens=cu_seqlens, labels=labels) for r in references])
        ref_logps = ref_logps if objective.reference in ("harmonic", "geometric") else ref_logps[0]
    return preference_loss(
        sequence_logps(logps, cu_seqlens=cu_seqlens), rewards, objective, ref_logps=ref_logps, ref_weights=ref_weights,
        lengths=lengths, group_size=group_size, cu_groups=cu_groups, reduction="none", backend=options["backend"],
    )  # fmt: skip


@torch.library.custom_op("rpo_kernels::linear_rpo_loss", mutates_args=())
def _forward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "linear_rpo_loss"
    options = Options(temperature, logit_scale, softcap, ignore_index, compute_dtype, logits_dtype, workspace_bytes, backend)
    N, V, device = labels.numel(), weight.shape[0], hidden.device
    S = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    spec = RPOObjective.from_spec(objective)
    checks.check_label_values(op, labels, V, ignore_index)
    checks.check_group_values(op, spec, S, N, cu_seqlens, cu_groups, rewards, ref_weights, normalizer)
    head = Head(op, weight, bias, options)
    ref_head = None if ref_hidden is None else head if ref_weight is weight else Head(op, ref_weight, ref_bias, options)

    # The one look at the device: tokens of each sequence, and ragged groups' boundaries.
    flat_labels = labels.reshape(-1)
    scored = (flat_labels != ignore_index).double()
    lengths = Segments(S, cu_seqlens).sum(scored.view(labels.shape)).int()
    true_lengths = lengths
    bounds = list(range(0, S + 1, group_size)) if cu_groups is None else None
    if counts is None:
        looked = (lengths if cu_groups is None else torch.cat([lengths, cu_groups])).tolist()
        counts, bounds = looked[:S], bounds or looked[S:]
    else:
        counts = list(counts)
        bounds = bounds or cu_groups.tolist()
        lengths = torch.tensor(counts, dtype=torch.int32, device=device)
        if device.type == "cpu" and not torch.equal(lengths, true_lengths):
            true = true_lengths.tolist()[:16]
            raise ValueError(f"{op}: `counts` must be the scored tokens of each sequence, {true}; got {counts[:16]}")
    n = sum(counts)
    rows = Scored.of(hidden, labels, options, n)
    ref_rows = None if ref_hidden is None else Scored.of(ref_hidden, labels, options, n)
    cu_tokens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    ref_per_token = ref_rows is not None
    if ref_rows is not None:
        ref_logps = torch.empty((1, n), dtype=torch.float32, device=device)
    elif ref_logps is not None and ref_logps.shape[1] == N:
        ref_logps, ref_per_token = ref_logps[:, rows.index], True

    # Which groups count does not depend on the log-probabilities: one group pass over zeros settles the normalisers.
    _, _, (*_, role), _, _ = group_pass(
        op, torch.zeros(S, device=device), None, 0, S, lengths, None, rewards, None, None, cu_groups, None, group_size,
        _dry(spec).spec, False, backend,
    )  # fmt: skip
    chosen = role == 2
    counted = chosen.sum()
    sft_share = (counted / torch.where(chosen, lengths, 0).sum().clamp(min=1)).float()
    if normalizer is None and mean:
        normalizer = counted.clamp(min=1).float()
    if counts is not None and device.type != "cpu":
        one = torch.ones((), device=device) if normalizer is None else normalizer
        normalizer = torch.where((lengths == true_lengths).all(), one, torch.nan)

    training = needs_hidden or needs_weight or needs_bias
    most = Chunks.capacity(options, V)
    sizes = [sum(counts[a:b]) for a, b in itertools.pairwise(bounds)]
    largest = max((size for size in sizes if size <= most), default=0) if training else 0
    chunks = Chunks.plan(head, n, largest, keeps_dlogits=needs_weight)
    units = pack_groups(counts, bounds, chunks.logits) if training else [Unit(slice(0, len(sizes)), slice(0, S), slice(0, n))]
    flat_hidden = hidden.reshape(-1, hidden.shape[-1])
    gradients = Gradients(head, flat_hidden, weight, (needs_hidden, needs_weight, needs_bias), chunks, n) if training else None
    scratch = head.buffer(0 if training and head.in_place else min(chunks.logits, n), logits_dtype)
    logps = torch.empty(n, dtype=torch.float32, device=device)
    scale = gradient_scale(spec, len(sizes), compute_dtype)
    unit_scale = None if scale == 1 else torch.full((), scale, device=device)
    outputs = []
    for unit in units:
        resident = training and unit.size <= chunks.logits
        parts = [
            slice(t, min(t + chunks.logits, unit.tokens.stop)) for t in range(unit.tokens.start, unit.tokens.stop, chunks.logits)
        ]
        lses = []
        for part in parts:
            size, y = part.stop - part.start, rows.labels[part]
            out = gradients.slot(size) if training and head.in_place else scratch[:size]
            if ref_rows is not None:
                ref_logps[0, part] = ref_head.forward(ref_head.logits(ref_rows.hidden[part], out), y)[0]
            logits = head.shown(head.logits(rows.hidden[part], out), y)
            logps[part], lse, _ = head.forward(logits, y)
            lses.append(lse)
        *group, coef = _group_pass_of(
            unit, op, logps, rows.labels, ignore_index, cu_tokens, rewards, ref_logps, ref_per_token, ref_weights, cu_groups,
            normalizer, group_size, objective, backend, sft_share,
        )  # fmt: skip
        outputs.append(group)
        for part, lse in zip(parts, lses) if training else ():
            size, y = part.stop - part.start, rows.labels[part]
            slot = gradients.slot(size)
            if head.in_place:
                logits = slot if resident else head.logits(rows.hidden[part], slot)
            elif not resident:
                logits = head.logits(rows.hidden[part], scratch[:size])
            local = slice(part.start - unit.tokens.start, part.stop - unit.tokens.start)
            head.backward(logits, y, logps[part], lse, coef[local], slot, upstream=unit_scale)
            gradients.add(rows.index[part], rows.hidden[part], slot)
    loss, losses, by_sequence = (list(x) for x in zip(*outputs))
    dhidden, dweight, dbias = gradients.finish() if training else (None, None, None)
    return (
        torch.stack(loss).sum(),
        torch.cat(losses),
        torch.cat(by_sequence, 1),
        true_lengths,
        dhidden.view(hidden.shape) if needs_hidden else hidden.new_empty(0),
        dweight if needs_weight else hidden.new_empty(0),
        dbias.to(bias.dtype) if needs_bias else hidden.new_empty(0),
    )


def gradient_scale(objective: RPOObjective, groups: int, dtype: torch.dtype) -> float:
    """A power of two that brings the coefficients, about beta / groups, near 1 where fp16 would lose them.

    A loss scaler acts too late: gradients are ready before its factor arrives.
    """
    if dtype != torch.float16:
        return 1.0
    return 2.0 ** max(-24, min(24, round(math.log2(groups / (objective.beta * objective.scale)))))


def _dry(objective: RPOObjective) -> RPOObjective:
    """The objective without a reference: same targets, same groups counted."""
    return replace(objective, reference="none")


def _group_pass_of(unit, op, logps, labels, ignore_index, cu_tokens, rewards, ref_logps, ref_per_token, ref_weights, cu_groups,
                   normalizer, group_size, objective, backend, sft_share):  # fmt: skip
    """The group pass over the tokens of one unit: loss, losses, [5, S], and dL/dlogps of its tokens."""
    s, g, t = unit.sequences, unit.groups, unit.tokens
    if ref_logps is not None:
        ref_logps = ref_logps[:, t if ref_per_token else s].contiguous()
    if ref_weights is not None and ref_weights.dim() == 2:
        ref_weights = ref_weights[:, g]
    if cu_groups is not None:
        cu_groups = cu_groups[g.start : g.stop + 1] - s.start
    loss, losses, by_sequence, _, coef = group_pass(
        op, logps[t], labels[t], ignore_index, s.stop - s.start, None, cu_tokens[s.start : s.stop + 1] - t.start,
        None if rewards is None else rewards[s], ref_logps, ref_weights, cu_groups, normalizer, group_size, objective, False,
        backend, sft_share, ref_per_token,
    )  # fmt: skip
    return loss, losses, by_sequence, coef


@_forward_op.register_fake
def _(hidden, weight, bias, labels, cu_seqlens, rh, rw, rb, rewards, rl, rws, cu_groups, normalizer, group_size, objective, mean,
      backend, counts, needs_hidden, needs_weight, needs_bias, *_):  # fmt: skip
    S = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    G = S // group_size if cu_groups is None else cu_groups.shape[0] - 1
    floats = torch.empty((), dtype=torch.float32, device=hidden.device)
    return (
        floats,
        floats.new_empty(G),
        floats.new_empty(5, S),
        floats.new_empty(S, dtype=torch.int32),
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if needs_hidden else hidden.new_empty(0),
        torch.empty(weight.shape, dtype=weight.dtype, device=hidden.device) if needs_weight else hidden.new_empty(0),
        torch.empty(bias.shape, dtype=bias.dtype, device=hidden.device) if needs_bias else hidden.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    *_, ctx.backend, _, needs_hidden, needs_weight, needs_bias = inputs[:21]
    ctx.needs = (needs_hidden, needs_weight, needs_bias)
    objective, compute_dtype = inputs[14], inputs[25]
    ctx.scale = gradient_scale(RPOObjective.from_spec(objective), output[1].shape[0], compute_dtype)
    ctx.save_for_backward(*inputs[:3], *output[4:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dloss, *_):
    none = (None,) * 25
    if dloss is None:
        return (None, None, None, *none)
    *sources, dhidden, dweight, dbias = ctx.saved_tensors
    if ctx.scale != 1:
        dloss = dloss / ctx.scale
    grads = []
    for grad, need in zip((dhidden, dweight, dbias), ctx.needs):
        if need:
            scale_(grad, dloss, ctx.backend)
        # a detached twin may become a parameter's .grad without a copy
        grads.append(once_differentiable(grad.detach(), *sources) if need else None)
    return (*grads, *none)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
