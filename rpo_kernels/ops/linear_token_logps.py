"""Token log-probabilities (and entropies) from hidden states and an lm_head, never holding more than a chunk of logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import distributed
from .autograd import once_differentiable
from .head import Chunks, Gradients, Head, Leaves, OnLogits, Options, Scored, empty_gradients, shown_to
from .linear_checks import check_count, check_leaves, check_on_logits, check_weight_grad, local_leaves, options_of, shard_of_head


@distributed.agreeing
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    lora_hidden: Tensor | None = None,
    lora_weight: Tensor | None = None,
    weight_grad: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    count: int | None = None,
    on_logits: OnLogits = None,
    process_group: ProcessGroup | None = None,
    reduce_dhidden: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Log-probability of each label under a linear head: :func:`token_logps` without the logits.

        x = hidden weight^T + lora_hidden lora_weight^T + bias

    Costs, in GEMMs of the scored rows with the head: 1 without gradients; 2 with a frozen head (d logp / d hidden is kept
    from the forward); 3 when all logits fit the workspace, else (and under ``torch.compile``) 4: the backward recomputes them.

    Args:
        hidden: ``[..., H]`` float32, float16 or bfloat16. Under autocast the GEMMs run in its dtype.
        weight: ``[V, H]``, the lm_head; tied weights are fine. A DTensor (FSDP2, of any layout) is gathered in hidden's dtype, and
            its gradient is the mean over the ranks of its mesh, reduced once, in fp32; bias and lora_weight likewise.
        labels: ``[...]`` int64 or int32, aligned with hidden. Rows that hold ignore_index take part in no GEMM.
        bias: ``[V]`` or None.
        lora_hidden, lora_weight: ``[..., r]`` and ``[V, r]``, or None: a low-rank term of the head. For LoRA on the lm_head these
            are scaling * dropout(hidden) A^T and B. Any float dtype; their GEMMs run in the dtype of the others.
        weight_grad: ``[V, H]``, float, that dweight is added to in the backward (weight.grad, or a trainer's fp32 buffer); autograd
            then brings weight none. Spares a ``[V, H]`` temporary; hooks of weight see nothing.
        temperature, logit_scale, softcap, ignore_index, backend: as for :func:`token_logps`.
        logits_dtype: of the chunk of logits: float32 (default: 16-bit logits cost up to 0.4 nats a sequence), or the dtype
            of the GEMMs.
        workspace_bytes: bound on logits and dlogits held at a time; 1 GiB on a GPU, 256 MiB on a CPU.
        count: number of scored rows, if the caller knows it: spares the one look at the device. A wrong count gives NaN.
        on_logits: called in the forward, without gradients, with each chunk of logits x ``[n, V]``, the labels ``[n]`` of its
            rows (scored ones, in order), and the keywords that make :func:`token_logps` of them. For statistics that need the
            whole row, such as accuracies, at no further GEMM; it may not keep or change x. Not under ``torch.compile``.
        process_group: ranks that hold the vocabulary together: weight, bias and lora_weight are this rank's rows ``[V_r, ...]``
            (in rank order; any number; a DTensor sharded in dimension 0 over the group will do), all else is the same on all
            ranks. See :func:`token_logps`. Hidden states that are a DTensor, replicated or sharded along the sequence, bring
            their group, and get a gradient laid out as they are.
        reduce_dhidden: sum the gradient of hidden (and lora_hidden) over the process group, in its dtype. False leaves each rank
            its part, for layers that sum it themselves: Megatron's column-parallel ones, or an all-gather along the sequence,
            whose backward is a reduce-scatter.

    Returns:
        float32 in the shape of labels, in nats; 0 at ignored positions. Gradients flow to hidden, weight, bias, lora_hidden and
        lora_weight; sums over chunks are fp32, rounded once. Second derivatives raise.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before anything is launched.
    """
    return _run("linear_token_logps", Leaves(hidden, weight, bias, lora_hidden, lora_weight), labels, weight_grad, count, on_logits,
                False, temperature, logit_scale, softcap, ignore_index, logits_dtype, workspace_bytes, process_group,
                reduce_dhidden, backend)[0]  # fmt: skip


@distributed.agreeing
def linear_token_logps_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    lora_hidden: Tensor | None = None,
    lora_weight: Tensor | None = None,
    weight_grad: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    count: int | None = None,
    on_logits: OnLogits = None,
    process_group: ProcessGroup | None = None,
    reduce_dhidden: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`linear_token_logps` and the entropy of each row in nats, from the same pass; both differentiable.

    Arguments and errors as there; a frozen head costs 3 GEMMs.
    """
    return _run("linear_token_logps_and_entropy", Leaves(hidden, weight, bias, lora_hidden, lora_weight), labels, weight_grad,
                count, on_logits, True, temperature, logit_scale, softcap, ignore_index, logits_dtype, workspace_bytes,
                process_group, reduce_dhidden, backend)  # fmt: skip


def _run(op, leaves, labels, weight_grad, count, on_logits, entropy, temperature, logit_scale, softcap, ignore_index,
         logits_dtype, workspace_bytes, process_group, reduce_dhidden, backend):  # fmt: skip
    leaves, process_group, reduce_dhidden = local_leaves(op, leaves, weight_grad, process_group, reduce_dhidden)
    check_on_logits(op, on_logits, process_group)
    hidden, weight, *_ = leaves
    group = distributed.group_name(op, process_group)
    check_leaves(op, leaves, labels, ignore_index, is_shard=bool(group))
    options = options_of(op, hidden, temperature, logit_scale, softcap, ignore_index, logits_dtype, workspace_bytes, backend)
    options = (*options, group, reduce_dhidden)
    check_count(op, count, labels.numel())
    check_weight_grad(op, weight_grad, weight)
    keep = _what_to_keep(labels.numel(), weight.shape[0], leaves.needs(), entropy, Options(*options))
    with shown_to(op, on_logits):
        logps, entropies, *_ = _forward_op(*leaves, labels, weight_grad, count, entropy, keep, *options)
    return logps, entropies


def _what_to_keep(N: int, V: int, needs: list[bool], entropy: bool, options: Options) -> str:
    """What the forward keeps for the backward: nothing, the unit gradients of hidden states, or the logits."""
    if needs == [True, False, False, False, False] and not entropy:
        return "unit gradients"
    # Traced backward graphs may not overwrite what the forward kept.
    if any(needs) and N <= Chunks.capacity(options, V) and not torch.compiler.is_compiling():
        return "logits"
    return "nothing"


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
def _forward_op(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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
    return (_spread(logps, rows.index, labels), _spread(entropies, rows.index, labels, entropy), _pad(lse, N), kept,
            labels.new_empty(0) if shard is None else shard.labels(labels, ignore_index))  # fmt: skip


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


@_forward_op.register_fake
def _(hidden, weight, bias, lora_hidden, lora_weight, labels, weight_grad, count, entropy, keep, t, s, c, i, compute_dtype,
      logits_dtype, w, b, group="", reduce_dhidden=True):  # fmt: skip
    logps = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
    entropies = logps.new_empty(labels.shape if entropy else (0,))
    N, V = labels.numel(), weight.shape[0]
    if keep == "logits":
        kept = torch.empty((N, -(-V // 16) * 16), dtype=logits_dtype, device=hidden.device)[:, :V]
    else:
        kept = hidden.new_empty((N, hidden.shape[-1]) if keep == "unit gradients" else (0,))
    return logps, entropies, logps.new_empty(2, N), kept, labels.new_empty(N if group else 0)


def _setup_context(ctx, inputs, output):
    *leaves, labels, ctx.weight_grad, ctx.count, ctx.entropy, ctx.keep = inputs[:10]
    ctx.options = list(inputs[10:])
    logps, entropies, lse, kept, local_labels = output
    if Options(*ctx.options).group:
        labels, ctx.options[Options._fields.index("ignore_index")] = local_labels.view(labels.shape), distributed.IGNORED
    ctx.save_for_backward(*leaves, labels, logps, lse, entropies if ctx.entropy else None, kept)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, kept, local_labels)


def _backward(ctx, dlogps, dentropies, *_):
    *leaves, labels, logps, lse, entropies, kept = ctx.saved_tensors
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
    arguments = (*leaves, labels, ctx.weight_grad, logps, lse, coef, entropies, dentropies, needs, ctx.count, *ctx.options)
    grads = _backward_op(kept if ctx.keep == "logits" else None, *arguments)
    if ctx.weight_grad is not None:
        needs[1] = False
    return (*(once_differentiable(g, *leaves) if need else None for g, need in zip(grads, needs)), *none)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("rpo_kernels::linear_token_logps_backward", mutates_args=("kept", "weight_grad"))
def _backward_op(
    kept: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    labels: Tensor,
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
    head = Head("linear_token_logps", weight, bias, options, lora_weight)
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
    return tuple(gradients.finish())


@_backward_op.register_fake
def _(kept, hidden, weight, bias, lora_hidden, lora_weight, labels, weight_grad, logps, lse, coef, entropies, entropy_coef, needs,
      *_):  # fmt: skip
    return empty_gradients(Leaves(hidden, weight, bias, lora_hidden, lora_weight), needs, weight_grad)
