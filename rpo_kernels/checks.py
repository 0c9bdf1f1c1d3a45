"""Checks of arguments: the operation, the argument, what was expected, what came, and the likely
slip.

Shapes, dtypes and devices are checked everywhere. Values are checked where looking at them is free,
on a CPU and not while a graph is traced (its operators look when they run); on a GPU a look would
stop the device, and the kernels turn what these checks refuse into NaN losses without reading out
of bounds.
"""

from __future__ import annotations

import math
from typing import TypeGuard

import torch
from torch import Tensor

from . import slips
from .backend import BACKENDS
from .objectives import DISTANCES, RPOObjective
from .tangents import check_tangents

REDUCTIONS = ("mean", "sum", "none")
_LOGITS = (torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32)


def shape_of(x: Tensor) -> str:
    return "[" + ", ".join(map(str, x.shape)) + "]"


def check_tensor(op: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{op}: `{name}` must be a torch.Tensor, got {type(x).__name__}"
            f"{slips.of_tensor(name, x)}"
        )
    if x.is_nested:
        raise TypeError(
            f"{op}: `{name}` must be a plain tensor, got a nested one; pass {name}.values(), "
            f"packed, and {name}.offsets().int() as `cu_seqlens` where sequences matter"
        )


def check_device(op: str, name: str, x: Tensor | None, device: torch.device) -> None:
    if x is not None and x.device != device:
        raise ValueError(
            f"{op}: `{name}` must be on {device} like the first argument, got {x.device}; pass "
            f"{name}.to({str(device)!r})"
        )


def check_float(op: str, name: str, x: Tensor) -> None:
    """fp32, fp16 or bf16."""
    if x.dtype not in _LOGITS:
        hint = (
            f"; pass {name}.float(): the kernels compute in float32, rpo_kernels.reference in "
            "float64"
            if x.dtype == torch.float64
            else ""
        )
        raise TypeError(f"{op}: `{name}` must be float32, float16 or bfloat16, got {x.dtype}{hint}")


def check_constant(op: str, name: str, x: Tensor) -> None:
    """No gradient flows into this argument, so none may be expected."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: `{name}` gets no gradient, but requires one; pass {name}.detach()")
    check_tangents(op, x)


def check_labels(op: str, labels: Tensor, like: Tensor, name: str, ignore_index: int) -> None:
    """Integer labels in the shape of the leading dimensions of logits (or hidden states)."""
    check_tensor(op, "labels", labels)
    if labels.dtype not in _INTEGERS:
        slip = slips.of_label_dtype(labels)
        raise TypeError(f"{op}: `labels` must be int64 or int32, got {labels.dtype}{slip}")
    expected = like.shape[:-1]
    if labels.shape != expected:
        raise ValueError(
            f"{op}: `labels` must be {list(expected)}, one for each position of `{name}`; got "
            f"{shape_of(labels)}{slips.of_label_shape(labels, like, name)}"
        )
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{op}: `ignore_index` must be an int, got {ignore_index!r}")


def check_logits(
    op: str,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    inplace_backward: bool,
    is_shard: bool = False,
) -> None:
    """``is_shard``: the columns are one rank's, perhaps none."""
    check_tensor(op, "logits", logits)
    check_float(op, "logits", logits)
    if logits.dim() == 0 or (logits.shape[-1] == 0 and not is_shard):
        raise ValueError(
            f"{op}: `logits` must be [..., V] with a vocabulary of at least one, got "
            f"{shape_of(logits)}"
        )
    check_labels(op, labels, logits, "logits", ignore_index)
    check_device(op, "labels", labels, logits.device)
    check_tangents(op, logits)
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"{op}: the last dimension of `logits` must be contiguous, got strides "
            f"{tuple(logits.stride())}; pass logits.contiguous()"
        )
    if inplace_backward and logits.is_leaf and logits.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: `inplace_backward` would overwrite `logits`, a leaf that requires a gradient, "
            "with that gradient; pass logits that a model computed, or inplace_backward=False"
        )
    if inplace_backward and _overlaps(logits):
        raise ValueError(
            f"{op}: with `inplace_backward` the rows of `logits` must not share memory, got shape "
            f"{shape_of(logits)} with strides {tuple(logits.stride())}; pass logits.contiguous()"
        )


def _overlaps(x: Tensor) -> bool:
    """Whether two elements may lie at one address: some stride does not step over all smaller
    dimensions.
    """
    reach = 0
    for stride, n in sorted((s, n) for s, n in zip(x.stride(), x.shape) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (n - 1)
    return False


def check_transform(op: str, temperature: float, logit_scale: float, softcap: float | None) -> None:
    for name, value in (
        ("temperature", temperature),
        ("logit_scale", logit_scale),
        ("softcap", softcap),
    ):
        if value is None and name == "softcap":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{op}: `{name}` must be a number, got {value!r}")
        if not 0 < value < math.inf:  # torch.compile traces a comparison, but not math.isfinite
            raise ValueError(f"{op}: `{name}` must be a finite number > 0, got {value!r}")


def check_choice(op: str, name: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(
            f"{op}: `{name}` must be one of {', '.join(map(repr, valid))}; got {value!r}"
        )


def check_backend(op: str, backend: object) -> None:
    check_choice(op, "backend", backend, BACKENDS)


def check_offsets(op: str, name: str, offsets: Tensor, device: torch.device) -> None:
    check_tensor(op, name, offsets)
    if offsets.dtype != torch.int32:
        raise TypeError(
            f"{op}: `{name}` must be int32 as in FlashAttention, got {offsets.dtype}; pass "
            f"{name}.int()"
        )
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(
            f"{op}: `{name}` must hold the boundaries [0, ..., total], at least two of them; got "
            f"shape {shape_of(offsets)}"
        )
    check_device(op, name, offsets, device)


def check_objective(op: str, objective: object) -> None:
    if not isinstance(objective, RPOObjective):
        slip = ", after `rewards`" if isinstance(objective, Tensor) else ""
        raise TypeError(
            f"{op}: `objective` must be an RPOObjective, got {_told(objective)}; for example "
            f"RPOObjective.dpo(beta=0.1){slip}"
        )


def check_rewards(
    op: str, rewards: Tensor | None, objective: RPOObjective, S: int, device: torch.device
) -> None:
    if rewards is None:
        if objective.uses_rewards:
            raise ValueError(
                f"{op}: `rewards` must be a tensor [S] = [{S}] for this objective, got None; to "
                "train without rewards, choose one with its own target, such as RPOObjective.dpo()"
            )
        return
    if not objective.uses_rewards:
        raise ValueError(
            f"{op}: `rewards` must be None for an objective with its own target (the first "
            f"response of each group is the chosen one), got {_told(rewards)}"
        )
    check_tensor(op, "rewards", rewards)
    if rewards.dtype == torch.bool or rewards.is_complex():
        raise TypeError(f"{op}: `rewards` must be real numbers, got {rewards.dtype}")
    if rewards.shape != (S,):
        hint = "; flatten the groups, rewards.flatten()" if rewards.numel() == S else ""
        raise ValueError(
            f"{op}: `rewards` must be one number per sequence, [S] = [{S}]; got "
            f"{shape_of(rewards)}{hint}"
        )
    check_constant(op, "rewards", rewards)
    check_device(op, "rewards", rewards, device)


def check_groups(
    op: str,
    objective: RPOObjective,
    S: int,
    group_size: object,
    cu_groups: Tensor | None,
    device: torch.device,
) -> int:
    """The group size: 2 by default, where cu_groups has no other say."""
    if S == 0:
        raise ValueError(
            f"{op}: at least one group of `group_size` responses is needed, got S = 0 sequences"
        )
    if cu_groups is not None:
        if objective.label is not None:
            raise ValueError(
                f"{op}: `cu_groups` must be None for an objective that labels pairs, got offsets; "
                "pass group_size=2"
            )
        if group_size is not None:
            raise ValueError(
                f"{op}: `group_size` and `cu_groups` both say which responses belong together, got "
                f"{group_size!r} and offsets; pass one of them"
            )
        check_offsets(op, "cu_groups", cu_groups, device)
        return 2
    given = group_size
    if group_size is None:
        group_size = 2
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"{op}: `group_size` must be an int, got {group_size!r}")
    least = 1 if objective.comparison == "pointwise" else 2
    if group_size < least:
        slip = "; sample more responses to each prompt, or choose comparison='pointwise'"
        raise ValueError(
            f"{op}: `group_size` must be at least {least} for comparison {objective.comparison!r}, "
            f"got {group_size}{slip if group_size == 1 else ''}"
        )
    if S % group_size:
        told = "2 (the default)" if given is None else group_size
        raise ValueError(
            f"{op}: `group_size` must divide the number of sequences, {S}, got {told}; pass the "
            "number of responses to each prompt, or `cu_groups` if it varies"
        )
    if objective.label is not None and group_size != 2:
        raise ValueError(
            f"{op}: `group_size` must be 2 for an objective that labels pairs, got {group_size}"
        )
    return group_size


def check_reference(
    op: str,
    objective: RPOObjective,
    ref_logps: Tensor | None,
    ref_weights: Tensor | None,
    shapes: list[tuple[int, ...]],
    G: int,
    device: torch.device,
    is_live: bool = False,
) -> None:
    """``shapes`` are those one reference may have: per sequence, and per token where there are
    tokens. ``is_live``: its log-probabilities are still to be computed."""
    several = objective.reference in ("harmonic", "geometric")
    if objective.reference == "none":
        if ref_logps is not None:
            raise ValueError(
                f"{op}: `ref_logps` must be None for an objective without a reference, got "
                f"{_told(ref_logps)}"
            )
    elif ref_logps is None and not is_live:
        raise ValueError(
            f"{op}: `ref_logps` must be {_any_of(shapes, several)} for this objective, got None; "
            "pass the reference model's log-probabilities, or build the objective with "
            "reference='none'"
        )
    if ref_weights is not None and not several:
        raise ValueError(
            f"{op}: `ref_weights` must be None unless the objective has reference='harmonic' or "
            f"'geometric', got {_told(ref_weights)} with reference={objective.reference!r}"
        )
    if ref_logps is None:
        return
    check_tensor(op, "ref_logps", ref_logps)
    check_float(op, "ref_logps", ref_logps)
    check_constant(op, "ref_logps", ref_logps)
    shape = tuple(ref_logps.shape[1:] if several else ref_logps.shape)
    if shape not in shapes or (several and not len(ref_logps)):
        hint = "" if several else slips.of_reference(shape, shapes)
        raise ValueError(
            f"{op}: `ref_logps` must be {_any_of(shapes, several)}, got {shape_of(ref_logps)}{hint}"
        )
    check_device(op, "ref_logps", ref_logps, device)
    if ref_weights is not None:
        check_tensor(op, "ref_weights", ref_weights)
        check_float(op, "ref_weights", ref_weights)
        check_constant(op, "ref_weights", ref_weights)
        R = len(ref_logps)
        if tuple(ref_weights.shape) not in ((R,), (R, G)):
            raise ValueError(
                f"{op}: `ref_weights` must be [R] = [{R}] or [R, G] = [{R}, {G}], got "
                f"{shape_of(ref_weights)}"
            )
        check_device(op, "ref_weights", ref_weights, device)


def _any_of(shapes: list[tuple[int, ...]], several: bool) -> str:
    lead = "R, " if several else ""
    return " or ".join(f"[{lead}{', '.join(map(str, s))}]" for s in shapes)


def _told(x: object) -> str:
    return f"a tensor {shape_of(x)}" if isinstance(x, Tensor) else repr(x)


def check_normalizer(op: str, reduction: object, normalizer: object, device: torch.device) -> None:
    check_choice(op, "reduction", reduction, REDUCTIONS)
    if normalizer is None:
        return
    if reduction == "none":
        raise ValueError(f"{op}: `normalizer` divides a sum, but `reduction` is 'none'; pass None")
    if isinstance(normalizer, Tensor):
        if normalizer.dtype == torch.bool or normalizer.is_complex():
            raise TypeError(f"{op}: `normalizer` must be a real number, got {normalizer.dtype}")
        if normalizer.numel() != 1:
            raise ValueError(
                f"{op}: `normalizer` must be a number or a scalar tensor, got shape "
                f"{shape_of(normalizer)}"
            )
        check_constant(op, "normalizer", normalizer)
        check_device(op, "normalizer", normalizer, device)
    elif isinstance(normalizer, bool) or not isinstance(normalizer, (int, float)):
        raise TypeError(
            f"{op}: `normalizer` must be a number or a scalar tensor, got {normalizer!r}"
        )
    elif not 0 < normalizer < math.inf:
        raise ValueError(f"{op}: `normalizer` must be finite and > 0, got {normalizer!r}")


# ---- values, looked at on a CPU only -------------------------------------------------------------


def _may_look(device: torch.device) -> bool:
    return device.type == "cpu" and not torch.compiler.is_compiling()


def _readable(x: Tensor | None) -> TypeGuard[Tensor]:
    return x is not None and _may_look(x.device)


def check_label_values(op: str, labels: Tensor, V: int, ignore_index: int) -> None:
    if not _readable(labels):
        return
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= V))
    if outside.any():
        label = int(labels[outside][0])
        raise ValueError(
            f"{op}: `labels` must lie in [0, {V}) or be ignore_index {ignore_index}, got {label}"
            f"{slips.of_label(op, label, V, ignore_index)}"
        )


def check_offset_values(op: str, name: str, offsets: Tensor | None, total: int, what: str) -> None:
    if not _readable(offsets):
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != total:
        raise ValueError(
            f"{op}: `{name}` must begin at 0 and end at the number of {what}, {total}; got {first} "
            f"and {last}{slips.of_offsets(name, offsets, total)}"
        )
    if (offsets.diff() < 0).any():
        raise ValueError(f"{op}: `{name}` must not decrease, got {offsets.tolist()[:16]}")


def check_reward_values(op: str, rewards: Tensor | None, objective: RPOObjective) -> None:
    if not _readable(rewards):
        return
    if rewards.isnan().any():
        raise ValueError(
            f"{op}: `rewards` must be numbers, got NaN at {int(rewards.isnan().nonzero()[0])}"
        )
    if rewards.isinf().any() and not objective.rules.infinite_targets:
        legal = " or ".join(repr(name) for name, x in DISTANCES.items() if x.infinite_targets)
        raise ValueError(
            f"{op}: `rewards` must be finite for distance {objective.distance!r}, got an infinite "
            f"one at {int(rewards.isinf().nonzero()[0])}; distance {legal} takes them"
        )


def check_weight_values(op: str, ref_weights: Tensor | None) -> None:
    if not _readable(ref_weights):
        return
    if (ref_weights < 0).any():
        raise ValueError(f"{op}: `ref_weights` must be >= 0, got {float(ref_weights.min()):g}")
    sums = ref_weights.double().sum(0)
    if not torch.allclose(
        sums, torch.ones_like(sums), atol=1e-2 if ref_weights.element_size() < 4 else 1e-5
    ):
        got = ", ".join(f"{x:g}" for x in sums.flatten()[:8].tolist())
        raise ValueError(f"{op}: `ref_weights` must sum to 1 over the references, got {got}")


def check_normalizer_value(op: str, normalizer: Tensor | None) -> None:
    if _readable(normalizer) and not (normalizer > 0 and normalizer.isfinite()):
        raise ValueError(f"{op}: `normalizer` must be finite and > 0, got {float(normalizer)}")


def check_length_values(op: str, lengths: Tensor | None) -> None:
    if _readable(lengths) and (lengths < 0).any():
        raise ValueError(f"{op}: `lengths` must be >= 0, got {int(lengths.min())}")


def check_group_values(
    op: str,
    device: torch.device,
    objective: RPOObjective,
    S: int,
    N: int,
    cu_seqlens: Tensor | None,
    cu_groups: Tensor | None,
    rewards: Tensor | None,
    ref_weights: Tensor | None,
    normalizer: Tensor | None,
) -> None:
    """What a group pass over S sequences of N tokens takes, all on one device."""
    if not _may_look(device):
        return
    check_offset_values(op, "cu_seqlens", cu_seqlens, N, "tokens")
    check_offset_values(op, "cu_groups", cu_groups, S, "sequences")
    check_reward_values(op, rewards, objective)
    check_weight_values(op, ref_weights)
    check_normalizer_value(op, normalizer)
