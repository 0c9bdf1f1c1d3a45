"""Checks of the arguments that only the linear operations take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import checks, distributed
from ..inputs import LogitTransform
from ..sums import Objective
from .head import CPU_WORKSPACE, GPU_WORKSPACE, Leaves, Options
from .token_logps import shard_of
from .windows import Reference


def local_leaves(
    op: str,
    leaves: Leaves,
    weight_grad: Tensor | None,
    process_group: ProcessGroup | None,
    reduce_dhidden: bool,
) -> tuple[Leaves, ProcessGroup | None, bool]:
    """Replace DTensors by their local part.

    Returns the leaves, the process group (the given one, or that of the DTensors), and whether the
    gradient of hidden has to be summed over it.
    """
    checks.check_tensor(op, "hidden", leaves.hidden)
    checks.check_flag(op, "reduce_dhidden", reduce_dhidden)
    if not any(map(distributed.is_dtensor, leaves)):
        return leaves, process_group, reduce_dhidden
    hidden, lora_hidden = leaves.hidden, leaves.lora_hidden
    if (
        distributed.is_dtensor(lora_hidden) != distributed.is_dtensor(hidden)
        and lora_hidden is not None
    ):
        raise TypeError(
            f"{op}: `lora_hidden` must be a DTensor if `hidden` is one, and a plain tensor "
            f"otherwise, got {type(lora_hidden).__name__}"
        )
    if distributed.is_dtensor(hidden):
        if lora_hidden is not None:
            lora_hidden, _ = distributed.local_hidden(op, "lora_hidden", lora_hidden, process_group)
        hidden, process_group = distributed.local_hidden(op, "hidden", hidden, process_group)
        reduce_dhidden = False  # DTensor sums it
    if distributed.is_dtensor(leaves.weight) and weight_grad is not None:
        raise ValueError(
            f"{op}: `weight_grad` must be None for a DTensor `weight`, whose gradient is shared by "
            f"several ranks, got {checks.shape_of(weight_grad)}"
        )
    local, dtype = distributed.local_parameter, compute_dtype(hidden)
    leaves = Leaves(
        hidden,
        local(op, "weight", leaves.weight, process_group, dtype),
        local(op, "bias", leaves.bias, process_group, dtype),
        lora_hidden,
        local(op, "lora_weight", leaves.lora_weight, process_group, dtype),
    )
    return leaves, process_group, reduce_dhidden


def check_on_logits(op: str, on_logits: object, process_group: object) -> None:
    if on_logits is not None and process_group is not None:
        raise ValueError(
            f"{op}: `on_logits` must be None with `process_group`, where no rank has whole rows "
            f"of logits; got {on_logits!r}"
        )


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of the GEMMs' inputs."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if under_autocast(kind) else hidden.dtype


def under_autocast(kind: str) -> bool:
    """Return whether a device runs under autocast; some, such as meta, have none."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def check_leaves(
    op: str, leaves: Leaves, labels: Tensor, ignore_index: int, is_shard: bool = False
) -> None:
    """Check a linear head and its low-rank term.

    The term may have any float dtype: adapters often stay in fp32 in a 16-bit model.
    """
    hidden, weight, bias, lora_hidden, lora_weight = leaves
    check_linear(op, hidden, weight, bias, labels, ignore_index, is_shard=is_shard)
    for name, x, other in (
        ("lora_hidden", lora_hidden, lora_weight),
        ("lora_weight", lora_weight, lora_hidden),
    ):
        if x is None and other is not None:
            raise ValueError(
                f"{op}: `{name}` must be a tensor where the other is one (the low-rank term is "
                "lora_hidden lora_weight^T), got None"
            )
        if x is None:
            continue
        checks.check_tensor(op, name, x)
        checks.check_float(op, name, x)
        checks.check_device(op, name, x, hidden.device)
        checks.check_tangents(op, x)
    if lora_hidden is None or lora_weight is None:
        return
    V = weight.shape[0]
    if lora_weight.dim() != 2 or lora_weight.shape[0] != V or not lora_weight.shape[1]:
        hint = (
            "; did you mean `lora_weight.t()`?"
            if lora_weight.dim() == 2 and lora_weight.shape[1] == V
            else ""
        )
        raise ValueError(
            f"{op}: `lora_weight` must be [V, r] with V = {V}, got "
            f"{checks.shape_of(lora_weight)}{hint}"
        )
    expected = (*labels.shape, lora_weight.shape[1])
    if tuple(lora_hidden.shape) != expected:
        raise ValueError(
            f"{op}: `lora_hidden` must be {list(expected)}, [..., r] with the shape of `labels` "
            f"and the rank of `lora_weight`; got {checks.shape_of(lora_hidden)}"
        )


def check_weight_grad(op: str, weight_grad: Tensor | None, weight: Tensor) -> None:
    """Check a buffer that dweight is to be added to."""
    if weight_grad is None:
        return
    checks.check_tensor(op, "weight_grad", weight_grad)
    checks.check_float(op, "weight_grad", weight_grad)
    checks.check_constant(op, "weight_grad", weight_grad)
    checks.check_device(op, "weight_grad", weight_grad, weight.device)
    if weight_grad.shape != weight.shape:
        raise ValueError(
            f"{op}: `weight_grad` must be [V, H] = {checks.shape_of(weight)} like `weight`, got "
            f"{checks.shape_of(weight_grad)}"
        )
    if checks.overlaps(weight_grad):
        raise ValueError(
            f"{op}: `weight_grad` must have memory of its own for each element, got strides "
            f"{tuple(weight_grad.stride())}"
        )
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError(
            f"{op}: `weight_grad` must be None for a `weight` that requires no gradient, got "
            f"{checks.shape_of(weight_grad)}"
        )


def check_linear(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    names: tuple[str, str, str] = ("hidden", "weight", "bias"),
    is_shard: bool = False,
) -> None:
    """Check shapes, dtypes and devices of a linear head or a shard of one.

    Dtypes may differ only under autocast.
    """
    h, w, b = names
    for name, x in ((h, hidden), (w, weight)):
        checks.check_tensor(op, name, x)
        checks.check_float(op, name, x)
    if weight.dim() != 2 or not (weight.shape[0] or is_shard):
        raise ValueError(
            f"{op}: `{w}` must be [V, H] with a vocabulary of at least one, got "
            f"{checks.shape_of(weight)}"
        )
    if not hidden.dim() or hidden.shape[-1] != weight.shape[1]:
        of_logits = op.removeprefix("linear_")
        hint = (
            f"; did you mean `{w}.t()`? If `{h}` holds logits, call {of_logits} instead"
            if hidden.dim() and hidden.shape[-1] == weight.shape[0]
            else ""
        )
        raise ValueError(
            f"{op}: `{h}` must be [..., H] with H = {weight.shape[1]} as in `{w}` "
            f"{checks.shape_of(weight)}; got {checks.shape_of(hidden)}{hint}"
        )
    checks.check_labels(op, labels, hidden, h, ignore_index)
    if weight.device != hidden.device:
        raise ValueError(
            f"{op}: `{w}` must be on {hidden.device} like `{h}`, got {weight.device}; pass "
            f"{h}.to({w}.device), and the other tensors there too"
        )
    checks.check_device(op, "labels", labels, hidden.device)
    if bias is not None:
        checks.check_tensor(op, b, bias)
        checks.check_float(op, b, bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{op}: `{b}` must be [V] = [{weight.shape[0]}], got {checks.shape_of(bias)}"
            )
        checks.check_device(op, b, bias, hidden.device)
    if hidden.dtype != weight.dtype and not under_autocast(hidden.device.type):
        raise TypeError(
            f"{op}: `{w}` must have the dtype of `{h}`, {hidden.dtype}, outside autocast; got "
            f"{weight.dtype}; call {op} under torch.autocast like the model, or cast one of them"
        )
    checks.check_tangents(op, hidden, weight, bias)


def options_of(
    op: str,
    hidden: Tensor,
    *,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    logits_dtype: torch.dtype | None,
    workspace_bytes: int | None,
    backend: str,
    vocab_ranks: str,
    reduce_dhidden: bool,
) -> Options:
    transform = LogitTransform.of(op, temperature, logit_scale, softcap, ignore_index)
    checks.check_backend(op, backend)
    compute = compute_dtype(hidden)
    logits_dtype = torch.float32 if logits_dtype is None else logits_dtype
    if logits_dtype not in (torch.float32, compute):
        raise ValueError(
            f"{op}: `logits_dtype` must be torch.float32 or the dtype of the GEMMs, {compute}; got "
            f"{logits_dtype}"
        )
    if workspace_bytes is None:
        workspace_bytes = CPU_WORKSPACE if hidden.device.type == "cpu" else GPU_WORKSPACE
    elif isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
        raise TypeError(f"{op}: `workspace_bytes` must be an int, got {workspace_bytes!r}")
    elif workspace_bytes <= 0:
        raise ValueError(f"{op}: `workspace_bytes` must be > 0, got {workspace_bytes}")
    return Options(
        transform, compute, logits_dtype, workspace_bytes, backend, vocab_ranks, reduce_dhidden
    )


def shard_of_head(
    op: str,
    options: Options,
    leaves: Leaves,
    labels: Tensor,
    check: Callable[[], None],
    **facts: object,
) -> distributed.Shard | None:
    """Return this rank's shard of the vocabulary, or None without ranks.

    All ranks compare their arguments and check the labels first.
    """
    said = options.transform._asdict() | options._asdict()
    told = {
        name: str(x)
        for name, x in said.items()
        if name not in ("transform", "ignore_index", "backend", "vocab_ranks")
    }
    facts |= {"the shape of `hidden`": tuple(leaves.hidden.shape), **told}
    return shard_of(
        op,
        options.vocab_ranks,
        leaves.weight.shape[0],
        labels,
        options.transform.ignore_index,
        check,
        **facts,
    )


def check_count(op: str, count: object, total: int) -> None:
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{op}: `count` must be an int, got {count!r}")
    if not 0 <= count <= total:
        raise ValueError(
            f"{op}: `count` must lie between 0 and the number of positions, {total}; got {count}"
        )


def check_counts(op: str, counts: object, S: int) -> list[int] | None:
    if counts is None:
        return None
    if (
        isinstance(counts, Tensor)
        or not isinstance(counts, Sequence)
        or not all(type(n) is int for n in counts)
    ):
        raise TypeError(
            f"{op}: `counts` must be a sequence of ints on the host, got {type(counts).__name__}"
        )
    if len(counts) != S or any(n < 0 for n in counts):
        raise ValueError(
            f"{op}: `counts` must be one number >= 0 per sequence, S = {S}; got {list(counts)[:16]}"
        )
    return list(counts)


@torch.no_grad()
def local_reference(
    op: str, hidden: Tensor, reference: Reference, process_group: ProcessGroup | None
) -> Reference:
    """Return the reference with DTensors replaced by their local part."""
    ref_hidden, ref_weight, ref_bias = reference
    if distributed.is_dtensor(ref_hidden):
        ref_hidden, _ = distributed.local_hidden(op, "ref_hidden", ref_hidden, None)
    named = {"ref_weight": ref_weight, "ref_bias": ref_bias}
    return Reference(
        ref_hidden,
        *(
            distributed.local_parameter(op, name, x, process_group, compute_dtype(hidden))
            for name, x in named.items()
        ),
    )


def check_live_reference(
    op: str,
    objective: Objective,
    leaves: Leaves,
    labels: Tensor,
    ignore_index: int,
    ref_logps: Tensor | None,
    reference: Reference,
    is_shard: bool,
) -> Reference:
    """Return the reference, detached; its weight is None if it uses the policy's head."""
    hidden, weight, bias, *_ = leaves
    ref_hidden, ref_weight, ref_bias = reference
    if ref_hidden is None:
        for name, x in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if x is not None:
                raise ValueError(
                    f"{op}: `{name}` must be None without `ref_hidden`, got {checks.shape_of(x)}"
                )
        return reference
    if ref_logps is not None:
        raise ValueError(
            f"{op}: `ref_logps` and `ref_hidden` both say what the reference is, got both; pass "
            "one of them"
        )
    if objective.reference != "single":
        raise ValueError(
            f"{op}: `ref_hidden` must be None unless the objective has reference='single', got one "
            f"with reference={objective.reference!r}"
        )
    is_shared = ref_weight is None and ref_bias is None
    if ref_weight is None:
        ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
    names = ("ref_hidden", "ref_weight", "ref_bias")
    check_linear(op, ref_hidden, ref_weight, ref_bias, labels, ignore_index, names, is_shard)
    checks.check_constant(op, "ref_hidden", ref_hidden)
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{op}: `ref_weight` must have the vocabulary of `weight`, {weight.shape[0]}; got "
            f"{ref_weight.shape[0]}"
        )
    if ref_hidden.dtype != hidden.dtype and not under_autocast(hidden.device.type):
        raise TypeError(
            f"{op}: `ref_hidden` must have the dtype of `hidden`, {hidden.dtype}; got "
            f"{ref_hidden.dtype}"
        )
    checks.check_device(op, "ref_hidden", ref_hidden, hidden.device)
    if is_shared:
        return Reference(ref_hidden.detach())
    return Reference(
        *(None if x is None else x.detach() for x in (ref_hidden, ref_weight, ref_bias))
    )
