"""Checks of what groups of responses are compared with: objective, rewards, references, weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks
from .checks import (
    check_choice,
    check_constant,
    check_device,
    check_float,
    check_offset_values,
    check_offsets,
    check_tensor,
    is_readable,
    shape_of,
)
from .objectives import DISTANCES, RPOObjective
from .sums import AnyObjective, Objective, ObjectiveSum

REDUCTIONS = ("mean", "sum", "none")


def check_objective(op: str, objective: AnyObjective) -> Objective:
    if isinstance(objective, RPOObjective | ObjectiveSum):
        return objective
    if (
        not isinstance(objective, (list, tuple))
        or not objective
        or not all(isinstance(part, (list, tuple)) and len(part) == 2 for part in objective)
    ):
        slip = ", after `rewards`" if isinstance(objective, Tensor) else ""
        raise TypeError(
            f"{op}: `objective` must be an RPOObjective, or pairs (weight, RPOObjective) for a "
            f"weighted sum, got {_told(objective)}; for example RPOObjective.dpo(beta=0.1){slip}"
        )
    try:
        return ObjectiveSum.of(objective)
    except (TypeError, ValueError) as error:
        message = str(error).removeprefix("RPOObjective: ")
        raise type(error)(f"{op}: `objective` is no sum: {message}") from None


def check_rewards(
    op: str, rewards: Tensor | None, objective: Objective, S: int, device: torch.device
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
    objective: Objective,
    S: int,
    group_size: object,
    cu_groups: Tensor | None,
    device: torch.device,
) -> int:
    """Return the group size, by default 2 unless `cu_groups` is given."""
    if S == 0:
        raise ValueError(
            f"{op}: at least one group of `group_size` responses is needed, got S = 0 sequences"
        )
    labels_pairs = any(part.label is not None for part in objective.parts)
    if cu_groups is not None:
        if labels_pairs:
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
    for comparison in {part.comparison: None for part in objective.parts}:
        least = 1 if comparison == "pointwise" else 2
        if group_size < least:
            slip = "; sample more responses to each prompt, or choose comparison='pointwise'"
            raise ValueError(
                f"{op}: `group_size` must be at least {least} for comparison {comparison!r}, got "
                f"{group_size}{slip if group_size == 1 else ''}"
            )
    if S % group_size:
        told = "2 (the default)" if given is None else group_size
        raise ValueError(
            f"{op}: `group_size` must divide the number of sequences, {S}, got {told}; pass the "
            "number of responses to each prompt, or `cu_groups` if it varies"
        )
    if labels_pairs and group_size != 2:
        raise ValueError(
            f"{op}: `group_size` must be 2 for an objective that labels pairs, got {group_size}"
        )
    return group_size


def check_reference(
    op: str,
    objective: Objective,
    ref_logps: Tensor | None,
    ref_weights: Tensor | None,
    shapes: list[tuple[int, ...]],
    G: int,
    device: torch.device,
    is_live: bool = False,
) -> None:
    """Check the reference's log-probabilities and weights.

    `shapes` are the allowed shapes of one reference: per sequence, and per token if there are
    tokens. With `is_live` its log-probabilities are computed later.
    """
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
        hint = "" if several else _slip_of_reference(shape, shapes)
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


def _slip_of_reference(got: tuple[int, ...], shapes: list[tuple[int, ...]]) -> str:
    """Why one reference's log-probabilities may have another shape than those expected."""
    (S,), tokens = shapes[0], shapes[-1]
    if got[1:] in shapes:
        return "; several references need an objective with reference='harmonic' or 'geometric'"
    if math.prod(got) == S:
        return "; pass ref_logps.flatten()"
    if len(tokens) == 2 and got == (S, tokens[1] - 1):
        return "; pass torch.nn.functional.pad(ref_logps, (0, 1)): the last position predicts none"
    if len(shapes) == 1 and len(got) == 2 and got[0] == S:
        return "; pass sequence_logps(ref_logps)"
    return ""


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
    else:
        checks.check_factor(op, "normalizer", normalizer)


def check_group_weights(
    op: str, group_weights: Tensor | None, G: int, device: torch.device
) -> None:
    if group_weights is None:
        return
    check_tensor(op, "group_weights", group_weights)
    check_float(op, "group_weights", group_weights)
    if group_weights.shape != (G,):
        raise ValueError(
            f"{op}: `group_weights` must be one number per group, [G] = [{G}]; got "
            f"{shape_of(group_weights)}"
        )
    check_constant(op, "group_weights", group_weights)
    check_device(op, "group_weights", group_weights, device)


def check_reward_values(op: str, rewards: Tensor | None, objective: Objective) -> None:
    if not is_readable(rewards):
        return
    if rewards.isnan().any():
        raise ValueError(
            f"{op}: `rewards` must be numbers, got NaN at {int(rewards.isnan().nonzero()[0])}"
        )
    finite = [
        x.distance for x in objective.parts if x.uses_rewards and not x.rules.infinite_targets
    ]
    if finite and rewards.isinf().any():
        legal = " or ".join(repr(name) for name, x in DISTANCES.items() if x.infinite_targets)
        raise ValueError(
            f"{op}: `rewards` must be finite for distance {finite[0]!r}, got an infinite "
            f"one at {int(rewards.isinf().nonzero()[0])}; distance {legal} takes them"
        )


def check_weight_values(op: str, ref_weights: Tensor | None) -> None:
    if not is_readable(ref_weights):
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
    if is_readable(normalizer) and not (normalizer > 0 and normalizer.isfinite()):
        raise ValueError(
            f"{op}: `normalizer` must be a finite number > 0 in float32, got {float(normalizer)}"
        )


def check_group_weight_values(op: str, group_weights: Tensor | None) -> None:
    if is_readable(group_weights) and not group_weights.isfinite().all():
        raise ValueError(f"{op}: `group_weights` must be finite, got {group_weights.tolist()[:16]}")


def check_group_values(
    op: str,
    device: torch.device,
    objective: Objective,
    S: int,
    N: int,
    cu_seqlens: Tensor | None,
    cu_groups: Tensor | None,
    rewards: Tensor | None,
    ref_weights: Tensor | None,
    normalizer: Tensor | None,
    group_weights: Tensor | None,
) -> None:
    """Check the values of everything that a group pass reads, for S sequences of N tokens."""
    if not checks.may_read(device):
        return
    check_offset_values(op, "cu_seqlens", cu_seqlens, N, "tokens")
    check_offset_values(op, "cu_groups", cu_groups, S, "sequences")
    check_reward_values(op, rewards, objective)
    check_weight_values(op, ref_weights)
    check_normalizer_value(op, normalizer)
    check_group_weight_values(op, group_weights)
