"""The plan of ``linear_token_logps``: chunks of rows to log-probabilities, and back once their gradient has come.

Under a frozen head the forward keeps d logp / d hidden; else the backward has the logits, if all of them fit the workspace, or
computes them again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import distributed
from .autograd import once_differentiable, only_once
from .gradients import Gradients, empty_gradients
from .head import Chunks, Head, Leaves, Options, Scored
from .linear_checks import shard_of_head


def scored_rows(
    op: str, hidden: Tensor, labels: Tensor, options: Options, count: int | None, lora_hidden: Tensor | None
) -> tuple[Scored, Tensor | None]:
    """The scored rows, and with a count from the caller a factor that is NaN if it is wrong."""
    scored = Scored.of(hidden, labels, options, count, lora_hidden)
    if count is None:
        return scored, None
    true = (labels != options.ignore_index).sum()
    if true.device.type == "cpu" and int(true) != count:
        raise ValueError(f"{op}: `count` must be the number of labels that are not ignore_index, {int(true)}; got {count}")
    return scored, torch.where(true == count, 1.0, torch.nan)


@torch.library.custom_op("rpo_kernels::linear_token_logps", mutates_args=())
def forward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    labels: Tensor,
    weight_grad: Tensor | None,
    count: int | None,
    entropy: bool,
    keep: str,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    workspace_bytes: int,
    backend: str,
    group: str = "",
    reduce_dhidden: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logps, entropies, [2, N] logsumexps, what is kept, and of a shard: labels ``[N]`` and ``[1]`` the widest one's columns, on
    the CPU, where the backward reads it: its plan is to be the same on all ranks)."""
    op = "linear_token_logps"
    options = Options(temperature, logit_scale, softcap, ignore_index, compute_dtype, logits_dtype, workspace_bytes, backend,
                      group, reduce_dhidden)  # fmt: skip
    facts = {"entropy": entropy, "`count`": count, "gradients": keep == "unit gradients"}
    shard = shard_of_head(op, options, hidden, weight, labels, lambda: None, **facts)
    head = Head(op, weight, bias, options, lora_weight, shard)
    rows, valid = scored_rows(op, hidden, labels, options, count, lora_hidden)
    rows = head.labelled(rows)
    n, N = rows.size, labels.numel()
    logps, lse, entropies = _outputs(hidden, n, n if entropy else 0)
    chunks = Chunks.plan(head, n, 0, keeps_dlogits=False)
    kept = hidden.new_empty(0)
    unit = None
    if keep == "logits":
        kept = head.buffer(N, logits_dtype)
    elif keep == "unit gradients":
        leaves = Leaves(hidden, weight, bias, lora_hidden, lora_weight)
        unit = Gradients(head, leaves, [True, False, False, False, False], chunks, n)
    scratch = head.buffer(0 if keep == "logits" or (unit and head.in_place) else min(chunks.logits, n), logits_dtype)
    ones = torch.ones(min(chunks.logits, n), dtype=torch.float32, device=hidden.device) if unit else None
    for start in range(0, n, chunks.logits):
        part = slice(start, min(start + chunks.logits, n))
        chunk, size = rows.part(part), part.stop - part.start
        out = kept[part] if keep == "logits" else unit.slot(size) if unit and head.in_place else scratch[:size]
        logits = head.shown(head.logits(chunk, out), chunk.labels)
        logps[part], lse[:, part], h = head.forward(logits, chunk.labels, entropy)
        if entropy:
            entropies[part] = h
        if unit:
            slot = unit.slot(size)
            head.backward(logits, chunk.labels, logps[part], lse[:, part].contiguous(), ones[:size], slot)
            unit.add(chunk, slot)
    if unit:
        kept = unit.finish()[0].view(N, hidden.shape[-1])
    if valid is not None:
        logps, entropies = logps * valid, entropies * valid
    local_labels = labels.new_empty(0) if shard is None else shard.labels(labels, ignore_index)
    return (_spread(logps, rows.index, labels), _spread(entropies, rows.index, labels, entropy), _pad(lse, N), kept, local_labels,
            torch.tensor([] if shard is None else [shard.widest], dtype=torch.int64))  # fmt: skip


def _outputs(like: Tensor, n: int, entropies: int) -> tuple[Tensor, Tensor, Tensor]:
    float32 = {"dtype": torch.float32, "device": like.device}
    return torch.empty(n, **float32), torch.empty(2, n, **float32), torch.empty(entropies, **float32)


def _spread(x: Tensor, index: Tensor, labels: Tensor, wanted: bool = True) -> Tensor:
    """Values of scored rows at their positions, 0 elsewhere."""
    if not wanted:
        return x
    return torch.zeros(labels.numel(), dtype=x.dtype, device=x.device).index_copy_(0, index, x).view(labels.shape)


def _pad(x: Tensor, N: int) -> Tensor:
    """``[2, n]`` in a tensor whose shape does not depend on the number of scored rows."""
    return torch.nn.functional.pad(x, (0, N - x.shape[1]))


@forward_op.register_fake
def _(hidden, weight, bias, lora_hidden, lora_weight, labels, weight_grad, count, entropy, keep, t, s, c, i, compute_dtype,
      logits_dtype, w, b, group="", reduce_dhidden=True):  # fmt: skip
    logps = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
    entropies = logps.new_empty(labels.shape if entropy else (0,))
    N, V = labels.numel(), weight.shape[0]
    if keep == "logits":
        kept = torch.empty((N, -(-V // 16) * 16), dtype=logits_dtype, device=hidden.device)[:, :V]
    else:
        kept = hidden.new_empty((N, hidden.shape[-1]) if keep == "unit gradients" else (0,))
    widest = torch.empty(1 if group else 0, dtype=torch.int64)
    return logps, entropies, logps.new_empty(2, N), kept, labels.new_empty(N if group else 0), widest


def _setup_context(ctx, inputs, output):
    *leaves, labels, ctx.weight_grad, ctx.count, ctx.entropy, ctx.keep = inputs[:10]
    ctx.options = list(inputs[10:])
    logps, entropies, lse, kept, local_labels, widest = output
    if Options(*ctx.options).group:
        labels, ctx.options[Options._fields.index("ignore_index")] = local_labels.view(labels.shape), distributed.IGNORED
    ctx.save_for_backward(*leaves, labels, widest, logps, lse, entropies if ctx.entropy else None, kept)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, kept, local_labels, widest)


def _backward(ctx, dlogps, dentropies, *_):
    if ctx.keep == "logits":
        only_once("linear_token_logps", ctx)
    *leaves, labels, widest, logps, lse, entropies, kept = ctx.saved_tensors
    none = (None,) * 15
    dentropies = dentropies if ctx.entropy else None
    if dlogps is None and dentropies is None:
        return (*(None,) * 5, *none)
    coef = torch.zeros_like(logps) if dlogps is None else dlogps.contiguous()
    needs = list(ctx.needs_input_grad[:5])
    if ctx.keep == "unit gradients":
        hidden, rows = leaves[0], coef.reshape(-1, 1)
        dhidden = torch.where(rows == 0, 0, rows * kept).to(hidden.dtype).view(hidden.shape)
        return (once_differentiable(dhidden, *leaves), *(None,) * 4, *none)
    arguments = (*leaves, labels, widest, ctx.weight_grad, logps, lse, coef, entropies, dentropies, needs, ctx.count, *ctx.options)
    grads = _backward_op(kept if ctx.keep == "logits" else None, *arguments)
    if ctx.weight_grad is not None:
        needs[1] = False
    return (*(once_differentiable(g, *leaves) if need else None for g, need in zip(grads, needs)), *none)


forward_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("rpo_kernels::linear_token_logps_backward", mutates_args=("kept", "weight_grad"))
def _backward_op(
    kept: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    labels: Tensor,
    widest: Tensor,
    weight_grad: Tensor | None,
    logps: Tensor,
    lse: Tensor,
    coef: Tensor,
    entropies: Tensor | None,
    entropy_coef: Tensor | None,
    needs: Sequence[bool],
    count: int | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    workspace_bytes: int,
    backend: str,
    group: str = "",
    reduce_dhidden: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the leaves from dL/dlogps, over logits that were kept, or are computed again."""
    options = Options(temperature, logit_scale, softcap, ignore_index, compute_dtype, logits_dtype, workspace_bytes, backend,
                      group, reduce_dhidden)  # fmt: skip
    leaves = Leaves(hidden, weight, bias, lora_hidden, lora_weight)
    head = Head("linear_token_logps", weight, bias, options, lora_weight, widest=int(widest) if options.group else None)
    rows = Scored.of(hidden, labels, options, count, lora_hidden)
    n, index = rows.size, rows.index
    chunks = Chunks.plan(head, n, 0, Gradients.keep_dlogits(needs))
    logps, coef = logps.reshape(-1)[index], coef.reshape(-1)[index]
    if entropy_coef is not None:
        entropies, entropy_coef = entropies.reshape(-1)[index], entropy_coef.reshape(-1)[index]
    in_kept = kept is not None and head.in_place  # the logits turn into dlogits where they lie
    gradients = Gradients(head, leaves, needs, chunks, n, weight_grad, buffer=kept if in_kept else None)
    scratch = head.buffer(0 if kept is not None or head.in_place else min(chunks.logits, n), options.logits_dtype)
    for start in range(0, n, chunks.logits):
        part = slice(start, min(start + chunks.logits, n))
        chunk, size = rows.part(part), part.stop - part.start
        slot = gradients.slot(size)
        if kept is not None:
            logits = kept[part]
            slot = logits if head.in_place else slot
        else:
            logits = head.logits(chunk, slot if head.in_place else scratch[:size])
        head.backward(
            logits, chunk.labels, logps[part], lse[:, part].contiguous(), coef[part], slot,
            None if entropy_coef is None else entropies[part], None if entropy_coef is None else entropy_coef[part],
        )  # fmt: skip
        gradients.add(chunk, slot)
    logits = slot = scratch = None  # the workspace is free before gradients are rounded
    return tuple(gradients.finish())


@_backward_op.register_fake
def _(kept, hidden, weight, bias, lora_hidden, lora_weight, labels, widest, weight_grad, logps, lse, coef, entropies,
      entropy_coef, needs, *_):  # fmt: skip
    return empty_gradients(Leaves(hidden, weight, bias, lora_hidden, lora_weight), needs, weight_grad)
