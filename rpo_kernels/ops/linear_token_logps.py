"""Token log-probabilities and entropies from hidden states and an lm_head, in chunks of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import distributed
from .gradients import (
    FiveTensors,
    Gradients,
    Kept,
    Store,
    empty_gradients,
    over_tokens,
    spared_bytes,
)
from .head import Chunks, Head, Leaves, OnLogits, Options, gathered, plan, shown_to
from .linear_checks import (
    check_count,
    check_leaves,
    check_on_logits,
    check_weight_grad,
    local_leaves,
    options_of,
    shard_of_head,
)
from .operator import Operator, once_differentiable


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
    """Log-probability of each label under a linear head.

    Equal to `token_logps` of the head's logits, which are never held as a whole:

        x = hidden weight^T + lora_hidden lora_weight^T + bias

    Cost, in GEMMs of the scored rows with the head: 1 without gradients, 2 with a frozen head, 3
    with a trainable one, for any loss. dlogp / dlogits of each row is computed in the forward and
    kept for dweight, as far as the workspace allows; the logits of the other rows are recomputed,
    at one GEMM for their share of the rows.

    `temperature`, `logit_scale`, `softcap`, `ignore_index` and `backend` are those of
    `token_logps`.

    Args:
        hidden: `[..., H]` float32, float16 or bfloat16. Under autocast the GEMMs run in its dtype.
            A DTensor, replicated or sharded along the sequence, provides the process group; its
            gradient has the same layout.
        weight: `[V, H]`, the lm_head; it may be tied. A DTensor (FSDP2, any layout) is gathered in
            the dtype of hidden, and its gradient is the mean over the ranks of its mesh, reduced
            once, in fp32; likewise bias and lora_weight.
        labels: `[...]` int64 or int32, aligned with hidden. Rows labelled ignore_index take part in
            no GEMM.
        bias: `[V]` or None.
        lora_hidden: `[..., r]` or None, left factor of a low-rank term of the head. For LoRA on the
            lm_head it is scaling * dropout(hidden) A^T. Any float dtype; its GEMMs run in the dtype
            of the others.
        lora_weight: `[V, r]` or None, right factor of that term; for LoRA it is B. Any float dtype.
        weight_grad: `[V, H]`, float, a buffer that dweight is added to in the backward
            (weight.grad, or a trainer's fp32 buffer). Autograd then returns no gradient for weight:
            this avoids a `[V, H]` temporary, and hooks of weight are not called.
        logits_dtype: dtype of the chunk of logits: float32 (default; 16-bit logits cost up to 0.4
            nats per sequence), or the dtype of the GEMMs.
        workspace_bytes: bound on the logits and dlogp / dlogits held at a time, allocated only as
            far as the batch needs it; default 2 GiB on a GPU, 256 MiB on a CPU. See docs/memory.md.
        count: number of scored rows, if the caller knows it: avoids the only synchronisation with
            the device. A wrong count raises on a CPU and gives NaN on a GPU.
        on_logits: function that is called in the forward, without gradients, with each chunk of
            logits x `[n, V]`, the labels `[n]` of its rows (scored rows, in order), and the keyword
            arguments with which `token_logps` reads it. For statistics of whole rows, such as
            accuracies, without another GEMM. It must not keep or change x. Not available under
            `torch.compile`.
        process_group: ranks that share the vocabulary: weight, bias and lora_weight are this rank's
            rows `[V_r, ...]` (in rank order, any number of rows; also as a DTensor sharded in
            dimension 0 over the group); everything else is the same on all ranks. See
            `token_logps`.
        reduce_dhidden: sum the gradients of hidden and lora_hidden over the process group, in their
            dtype and for the scored rows only; the sum overlaps the GEMMs that follow. With False
            each rank keeps its part, for layers that sum it themselves: Megatron's column-parallel
            ones, or an all-gather along the sequence, whose backward is a reduce-scatter.

    Returns:
        float32 in the shape of labels, in nats; 0 at ignored positions. Gradients flow to hidden,
        weight, bias, lora_hidden and lora_weight, from any loss; they are summed over chunks in
        fp32 and rounded once. A second backward (`retain_graph`) gives the same numbers; second
        derivatives raise.

    Raises:
        ValueError, TypeError: if an argument does not fit; checked before any launch.
    """
    return _linear_token_logps(
        "linear_token_logps",
        Leaves(hidden, weight, bias, lora_hidden, lora_weight),
        labels,
        NONE,
        weight_grad,
        count,
        on_logits,
        process_group,
        reduce_dhidden,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        logits_dtype=logits_dtype,
        workspace_bytes=workspace_bytes,
        backend=backend,
    )[0]


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
    entropy_grad: bool | None = None,
    process_group: ProcessGroup | None = None,
    reduce_dhidden: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`linear_token_logps` and the entropy of each row in nats, from the same pass.

    Arguments, results and errors as there, and:

    Args:
        entropy_grad: whether the entropies will be differentiated. With False (entropies that are
            only reported) they have no gradient and the cost is that of `linear_token_logps`. With
            True the logits are recomputed in the backward: 4 GEMMs, 3 with a frozen head. None
            (default) costs as much as False if the entropies receive no gradient; otherwise one
            GEMM, and memory up to the workspace, more than True.
    """
    if entropy_grad is not None and not isinstance(entropy_grad, bool):
        raise TypeError(
            "linear_token_logps_and_entropy: `entropy_grad` must be True, False or None, got "
            f"{entropy_grad!r}"
        )
    return _linear_token_logps(
        "linear_token_logps_and_entropy",
        Leaves(hidden, weight, bias, lora_hidden, lora_weight),
        labels,
        {None: UNDECIDED, False: REPORTED, True: DIFFERENTIABLE}[entropy_grad],
        weight_grad,
        count,
        on_logits,
        process_group,
        reduce_dhidden,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        logits_dtype=logits_dtype,
        workspace_bytes=workspace_bytes,
        backend=backend,
    )


# What the caller needs of the entropies.
NONE, REPORTED, UNDECIDED, DIFFERENTIABLE = range(4)


def _linear_token_logps(
    op: str,
    leaves: Leaves,
    labels: Tensor,
    entropy: int,
    weight_grad: Tensor | None,
    count: int | None,
    on_logits: OnLogits,
    process_group: ProcessGroup | None,
    reduce_dhidden: bool,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    with distributed.raising_together(op, process_group=process_group):
        leaves, process_group, reduce_dhidden = local_leaves(
            op, leaves, weight_grad, process_group, reduce_dhidden
        )
        check_on_logits(op, on_logits, process_group)
        vocab_ranks = distributed.group_name(op, process_group)
        check_leaves(op, leaves, labels, settings["ignore_index"], is_shard=bool(vocab_ranks))
        options = options_of(
            op, leaves.hidden, vocab_ranks=vocab_ranks, reduce_dhidden=reduce_dhidden, **settings
        )
        check_count(op, count, labels.numel())
        check_weight_grad(op, weight_grad, leaves.weight)
        call = _token_logps.on(leaves.hidden)
        size = -1 if call is _token_logps.eager else labels.numel() if count is None else count
        with shown_to(op, on_logits):
            logps, entropies, *_ = call(
                *leaves,
                labels,
                weight_grad,
                -1 if count is None else count,
                entropy,
                leaves.needs(),
                size,
                options,
            )
    return logps, entropies


def scored_index(op: str, labels: Tensor, ignore_index: int, count: int) -> Tensor:
    """Return the flat positions `[n]` of the scored rows.

    Shapes depend on n: this is the one synchronisation, unless the count (>= 0) is known.
    """
    scored = labels.reshape(-1) != ignore_index
    if count < 0:
        distributed.check_capture(op, "count")
        return scored.nonzero()[:, 0]
    return torch.argsort(scored, descending=True, stable=True)[:count]


def _right_count(op: str, labels: Tensor, ignore_index: int, count: int) -> Tensor:
    """Return 1, or NaN if the caller's count of scored rows is wrong; on a CPU that raises."""
    true = (labels != ignore_index).sum()
    if true.device.type == "cpu" and int(true) != count:
        raise ValueError(
            f"{op}: `count` must be the number of labels that are not ignore_index, {int(true)}; "
            f"got {count}"
        )
    return torch.where(true == count, 1.0, torch.nan)


def late_chunks(
    op: str,
    leaves: Leaves,
    needs: list[bool],
    options: Options,
    widest: int,
    rows: int,
    weight_grad: Tensor | None,
) -> Chunks:
    """Plan for a backward in which kept P and recomputed logits share the workspace.

    Chunks of logits are those of the widest shard, because all ranks combine each chunk. How much P
    is kept each rank decides by itself: its shape must be known in a trace, where the widths of
    other ranks are not.
    """
    keeps = over_tokens(needs)
    spared = spared_bytes(leaves, needs, options, weight_grad)
    ours, common = (
        plan(op, options, V, rows, leaves.hidden.is_cuda, keeps, spared)
        for V in (leaves.weight.shape[0], widest)
    )
    dropped = ours.logits if keeps and rows > ours.waiting else 0
    return Chunks(common.logits, ours.waiting - dropped)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    labels: Tensor,
    weight_grad: Tensor | None,
    count: int,  # number of scored rows; -1: unknown
    entropy: int,
    needs: list[bool],
    size: int,  # rows of what is kept, in traces, whose shapes depend on no label; else -1
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return log-probabilities and entropies in the shape of labels, and the fields of `Kept`."""
    op = "linear_token_logps" if entropy == NONE else "linear_token_logps_and_entropy"
    leaves = Leaves(hidden, weight, bias, lora_hidden, lora_weight)
    shard = shard_of_head(
        op,
        options,
        leaves,
        labels,
        lambda: None,
        entropy=entropy,
        **{"`count`": count, "gradients": needs},
    )
    head = Head(op, leaves, options, shard)
    ignore_index = options.transform.ignore_index
    valid = None if count < 0 else _right_count(op, labels, ignore_index, count)
    index = scored_index(op, labels, ignore_index, count)
    rows = head.rows(leaves, labels, index)
    n = rows.size if size < 0 else size
    now = _needs_now(needs, entropy)
    chunks = late_chunks(op, leaves, now, options, head.widest, n, weight_grad)
    store = Store.new(head, rows, now, chunks, entropy != NONE, n)
    store.read(slice(0, rows.size))

    def spread(x: Tensor) -> Tensor:
        x = x[: rows.size] if valid is None else x[: rows.size] * valid
        return x.new_zeros(labels.numel()).index_copy_(0, index, x).view(labels.shape)

    kept = store.kept()
    return (
        spread(kept.logps),
        kept.entropies.new_empty(0) if entropy == NONE else spread(kept.entropies),
        *kept,
    )


def _needs_now(needs: list[bool], entropy: int) -> list[bool]:
    """Return which gradients the forward prepares: none if entropies will be differentiated."""
    return [False] * 5 if entropy == DIFFERENTIABLE else needs


def _fake_forward(*inputs: Any) -> tuple[Tensor, ...]:
    *tensors, labels, weight_grad, _, entropy, needs, size, options = inputs
    leaves, now = Leaves(*tensors), _needs_now(needs, entropy)
    chunks = late_chunks(
        "linear_token_logps", leaves, now, options, leaves.weight.shape[0], size, weight_grad
    )
    logps = leaves.hidden.new_empty(labels.shape, dtype=torch.float32)
    entropies = torch.empty_like(logps) if entropy != NONE else logps.new_empty(0)
    return (logps, entropies, *Store.fake_kept(leaves, now, options, chunks, size, entropy != NONE))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *leaves, _, ctx.weight_grad, _, ctx.entropy, _, _, ctx.options = inputs
    ctx.save_for_backward(*leaves, *output[2:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2 if ctx.entropy >= UNDECIDED else 1 :])


def _backward(
    ctx: Any, dlogps: Tensor | None, dentropies: Tensor | None, *_: Tensor | None
) -> tuple:
    saved = ctx.saved_tensors  # read once: checkpointing allows no second access
    leaves, kept = saved[:5], Kept(*saved[5:])
    needs = list(ctx.needs_input_grad[:5])
    none = (None,) * 2
    if dlogps is None and dentropies is None:
        return (*(None,) * 5, *none)
    with torch.no_grad():
        at_rows = lambda x: None if x is None else x.reshape(-1)[kept.index].float()
        coef = kept.logps.new_zeros(kept.logps.shape) if dlogps is None else at_rows(dlogps)
        gradients = settle.on(leaves[0])(
            ctx.weight_grad,
            *leaves,
            kept,
            coef,
            at_rows(dentropies),
            ctx.entropy == DIFFERENTIABLE or dentropies is not None,
            needs,
            ctx.options,
        )
    if ctx.weight_grad is not None:
        needs[1] = False
    return (
        *(once_differentiable(g, *leaves) if need else None for g, need in zip(gradients, needs)),
        *none,
    )


_token_logps = Operator(
    "linear_token_logps", 7, _forward, _fake_forward, _setup_context, _backward, waits=True
)


# ---- gradients from what was kept ----------------------------------------------------------------


def _settle(
    weight_grad: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    kept: Kept,
    coef: Tensor,  # [n], dL / dlogp of the rows
    entropy_coef: Tensor | None,  # [n], dL / dentropy
    from_logits: bool,  # entropies have coefficients, which enter dlogits: kept P and U are unused
    needs: list[bool],
    options: Options,
) -> FiveTensors:
    """Return the gradients of the leaves."""
    leaves = Leaves(hidden, weight, bias, lora_hidden, lora_weight)
    n, dropped = kept.sizes.tolist()
    if options.vocab_ranks:  # kept labels are relative to the shard's first column
        transform = options.transform._replace(ignore_index=distributed.IGNORED)
        options = options._replace(transform=transform)
    # kept P leaves less memory for new dlogits: smaller batches
    keeps = over_tokens(needs) and not (from_logits and len(kept.p))
    head = Head("linear_token_logps", leaves, options)
    chunks = head.plan(n, keeps, spared_bytes(leaves, needs, options, weight_grad))
    rows = gathered(leaves, options.compute_dtype, kept.index[:n], kept.labels[:n])
    once = n <= chunks.waiting if from_logits else not dropped
    gradients = Gradients(leaves, needs, rows, options, once=once, weight_grad=weight_grad)
    store = Store(head, rows, needs, chunks, kept, slice(dropped, n), is_saved=True)
    if from_logits:
        store.settle_with_entropies(
            coef[:n], None if entropy_coef is None else entropy_coef[:n], gradients
        )
    else:
        store.settle(slice(0, n), coef[:n], gradients)
    return gradients.finish()


def _fake_settle(*inputs: Any) -> FiveTensors:
    weight_grad, *leaves = inputs[:6]
    *_, needs, _ = inputs
    return empty_gradients(Leaves(*leaves), needs, weight_grad)


settle = Operator("linear_settle", 6, _settle, _fake_settle, mutates=("weight_grad",), waits=True)
