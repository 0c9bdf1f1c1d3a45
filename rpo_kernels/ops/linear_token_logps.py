"""Token log-probabilities (and entropies) from hidden states and an lm_head, never holding more than a chunk of logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import distributed
from .head import Chunks, Leaves, OnLogits, Options, shown_to
from .linear_checks import check_count, check_leaves, check_on_logits, check_weight_grad, local_leaves, options_of
from .token_plan import forward_op


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
        reduce_dhidden: sum the gradient of hidden (and lora_hidden) over the process group, in its dtype: scored rows alone, each
            chunk's beside the GEMMs of the next. False leaves each rank its part, for layers that sum it themselves: Megatron's
            column-parallel ones, or an all-gather along the sequence, whose backward is a reduce-scatter.

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
        logps, entropies, *_ = forward_op(*leaves, labels, weight_grad, count, entropy, keep, *options)
    return logps, entropies


def _what_to_keep(N: int, V: int, needs: list[bool], entropy: bool, options: Options) -> str:
    """What the forward keeps for the backward: nothing, the unit gradients of hidden states, or the logits."""
    if needs == [True, False, False, False, False] and not entropy:
        return "unit gradients"
    # Traced backward graphs may not overwrite what the forward kept.
    if any(needs) and N <= Chunks.capacity(options, V) and not torch.compiler.is_compiling():
        return "logits"
    return "nothing"
