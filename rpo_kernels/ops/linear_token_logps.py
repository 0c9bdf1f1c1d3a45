"""Token log-probabilities (and entropies) from hidden states and an lm_head, never holding more
than a chunk of logits.
"""

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
    """Log-probability of each label under a linear head: :func:`token_logps` without the logits.

        x = hidden weight^T + lora_hidden lora_weight^T + bias

    Costs, in GEMMs of the scored rows with the head: 1 without gradients; 2 with a frozen head; 3
    with a trainable one, whatever the loss. d logp / d logits of each row is computed in the
    forward and kept for dweight, as far as the workspace goes; the logits of rows beyond it are
    computed once more, at one GEMM for their share of the rows.

    Args:
        hidden: ``[..., H]`` float32, float16 or bfloat16. Under autocast the GEMMs run in its
            dtype.
        weight: ``[V, H]``, the lm_head; tied weights are fine. A DTensor (FSDP2, of any layout) is
            gathered in hidden's dtype, and its gradient is the mean over the ranks of its mesh,
            reduced once, in fp32; bias and lora_weight likewise.
        labels: ``[...]`` int64 or int32, aligned with hidden. Rows that hold ignore_index take part
            in no GEMM.
        bias: ``[V]`` or None.
        lora_hidden, lora_weight: ``[..., r]`` and ``[V, r]``, or None: a low-rank term of the head.
            For LoRA on the lm_head these are scaling * dropout(hidden) A^T and B. Any float dtype;
            their GEMMs run in the dtype of the others.
        weight_grad: ``[V, H]``, float, that dweight is added to in the backward (weight.grad, or a
            trainer's fp32 buffer); autograd then brings weight none. Avoids a ``[V, H]`` temporary;
            hooks of weight see nothing.
        temperature, logit_scale, softcap, ignore_index, backend: as for :func:`token_logps`.
        logits_dtype: of the chunk of logits: float32 (default: 16-bit logits cost up to 0.4 nats a
            sequence), or the dtype of the GEMMs.
        workspace_bytes: bound on logits and d logp / d logits held at a time, of which as much is
            allocated as the batch needs; 2 GiB on a GPU, 256 MiB on a CPU. See docs/memory.md.
        count: number of scored rows, if the caller knows it: avoids the only synchronisation. A
            wrong count gives NaN.
        on_logits: called in the forward, without gradients, with each chunk of logits x ``[n, V]``,
            the labels ``[n]`` of its rows (scored ones, in order), and the keywords that make
            :func:`token_logps` of them. For statistics that need the whole row, such as accuracies,
            at no further GEMM; it may not keep or change x. Not under ``torch.compile``.
        process_group: ranks that hold the vocabulary together: weight, bias and lora_weight are
            this rank's rows ``[V_r, ...]`` (in rank order; any number; a DTensor sharded in
            dimension 0 over the group will do), all else is the same on all ranks. See
            :func:`token_logps`. Hidden states that are a DTensor, replicated or sharded along the
            sequence, bring their group, and get a gradient laid out as they are.
        reduce_dhidden: sum the gradient of hidden (and lora_hidden) over the process group, in its
            dtype and of the scored rows only; the sum overlaps the GEMMs that follow. False leaves
            each rank its part, for layers that sum it themselves: Megatron's column-parallel ones,
            or an all-gather along the sequence, whose backward is a reduce-scatter.

    Returns:
        float32 in the shape of labels, in nats; 0 at ignored positions. Gradients flow to hidden,
        weight, bias, lora_hidden and lora_weight, from any loss; sums over chunks are fp32, rounded
        once. A second backward (``retain_graph``) gives the same numbers; second derivatives raise.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before anything is launched.
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
    """:func:`linear_token_logps` and the entropy of each row in nats, from the same pass.

    Arguments and errors as there, and:

    Args:
        entropy_grad: whether the entropies will be differentiated. False (they are only reported)
            costs what :func:`linear_token_logps` does, and they have no gradient; True computes the
            logits once more in the backward: 4 GEMMs, 3 with a frozen head. None (default) costs
            what False does where no gradient of the entropies arrives, and one GEMM and up to the
            workspace more than True where one does.
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


# What is wanted of entropies.
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
    """Flat positions ``[n]`` of the scored rows.

    Their number decides shapes: one synchronisation, unless the count (>= 0) is known.
    """
    scored = labels.reshape(-1) != ignore_index
    if count < 0:
        distributed.check_capture(op, "count")
        return scored.nonzero()[:, 0]
    return torch.argsort(scored, descending=True, stable=True)[:count]


def _right_count(op: str, labels: Tensor, ignore_index: int, count: int) -> Tensor:
    """A factor that is NaN if the caller's count of scored rows is wrong; on a CPU that raises."""
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
    """Of a store that is settled in a backward, where P that was kept and the logits that are
    computed again lie side by side.

    Chunks of logits are those of the widest shard, because ranks combine each; how much P is kept
    is a rank's own affair, and its shape is known in a trace, where other ranks' widths are not.
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
    count: int,  # of scored rows; -1: unknown
    entropy: int,
    needs: list[bool],
    size: int,  # in traces, whose shapes depend on no label: rows of what is kept; else -1
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities and entropies in the shape of labels, and the fields of :class:`Kept`."""
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
    """Gradients that the forward prepares: with entropies to differentiate, none."""
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
    saved = ctx.saved_tensors  # once: checkpoints refuse a second look
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


# ---- what waited, settled ------------------------------------------------------------------------


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
    # whether nothing waited, because coefficients of entropies go into dlogits themselves
    from_logits: bool,  # coefficients of entropies go into dlogits: what was kept is of no use
    needs: list[bool],
    options: Options,
) -> FiveTensors:
    """Gradients of the leaves."""
    leaves = Leaves(hidden, weight, bias, lora_hidden, lora_weight)
    n, dropped = kept.sizes.tolist()
    if options.vocab_ranks:  # labels that were kept count from the shard's first column
        transform = options.transform._replace(ignore_index=distributed.IGNORED)
        options = options._replace(transform=transform)
    # beside P that was kept, new dlogits come in smaller batches
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
