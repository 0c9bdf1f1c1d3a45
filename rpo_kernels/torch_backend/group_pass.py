"""The group pass in PyTorch, for CPUs; same signature and results as `kernels.group_pass`.

It works on `[G, K, K]` pairs in float64, where the textbook forms of the distances are accurate.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..inputs import Groups, Sequences
from ..objectives import RPOObjective
from .distances import distance_of_gap, distance_of_outcome, distance_pull, labelled


def group_pass(
    logps: torch.Tensor,
    labels: torch.Tensor | None,
    lengths: torch.Tensor | None,
    sequences: Sequences,
    groups: Groups,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the group pass over tokens or sequences; see `kernels.group_pass`."""
    (
        whole,
        rewards,
        ref_logps,
        ref_weights,
        cu_groups,
        normalizer,
        group_size,
        mean,
        ref_per_token,
        group_weights,
        sft_share,
    ) = groups
    (objective,) = whole.parts
    S, cu_seqlens, device = sequences.number, sequences.cu_seqlens, logps.device
    members = _members(S, group_size, cu_groups, device)
    group_of = torch.empty(S, dtype=torch.int64, device=device)
    present = members >= 0
    group_of[members[present]] = present.nonzero()[:, 0]

    if labels is not None:
        token_sequence = _segment_of(labels.numel(), S, cu_seqlens, device)
        scored = labels != ignore_index

        def total(x: torch.Tensor) -> torch.Tensor:
            x = torch.where(scored, x, 0).double()
            return torch.zeros(S, dtype=torch.float64, device=device).index_add_(
                0, token_sequence, x
            )

        lengths = torch.zeros(S, dtype=torch.int32, device=device)
        lengths.index_add_(0, token_sequence, scored.int())
        l = total(logps)
        if ref_logps is not None and ref_per_token:
            ratios = torch.stack([total(logps.double() - ref) for ref in ref_logps])
        else:
            ratios = l[None] - (0 if ref_logps is None else ref_logps.double())
    else:
        l = logps.double()
        ratios = l[None] - (0 if ref_logps is None else ref_logps.double())
        lengths = (
            torch.ones(S, dtype=torch.int32, device=device) if lengths is None else lengths.int()
        )

    n = lengths.clamp(min=1).double()
    unit = objective.beta / n if objective.average else torch.full_like(n, objective.beta)
    s = torch.where(lengths > 0, unit * _combine(ratios, ref_weights, group_of, objective), 0)
    t = _targets(S, objective, rewards, members, device)

    # [G, K] from here on; missing and empty responses are masked
    present = present & (lengths[members.clamp(min=0)] > 0)
    sg, tg = s[members.clamp(min=0)], t[members.clamp(min=0)]
    chosen, counted = _roles(tg, present, objective)
    margin = objective.margin * F.one_hot(chosen, sg.shape[1]).double()
    losses, slopes, tg = _distance(sg - margin, tg, present, objective)
    live = counted[:, None] & present
    losses = torch.where(counted, objective.scale * losses, 0)
    slopes = torch.where(live, objective.scale * slopes, 0)

    number = counted.sum().double()
    chosen = members.gather(1, chosen[:, None])[:, 0].clamp(min=0)
    sft = torch.zeros(S, dtype=torch.float64, device=device)  # weight on -l_i
    if objective.sft_weight > 0:
        per_sequence = torch.full_like(n, objective.sft_weight)
        if objective.sft_normalizer == "mean":
            per_sequence = per_sequence / n
        elif objective.sft_normalizer == "tokens":
            share = (
                number / lengths[chosen[counted]].sum().clamp(min=1)
                if sft_share is None
                else sft_share
            )
            per_sequence = per_sequence * share
        sft[chosen[counted]] = per_sequence[chosen[counted]]
        losses = losses - torch.where(
            counted, sft[chosen] * torch.where(sft[chosen] > 0, l[chosen], 0), 0
        )

    if group_weights is not None:
        losses = losses * group_weights.double()
    factor = torch.ones((), dtype=torch.float64, device=device)
    if normalizer is not None:
        factor = 1 / normalizer.double()
    elif mean:
        factor = torch.where(number > 0, 1 / number.clamp(min=1), 0)
    slope, s_out, t_out, role = (torch.zeros_like(s) for _ in range(4))
    slots = members >= 0
    slope[members[slots]] = slopes[slots]
    s_out[members[slots]] = sg[slots]
    t_out[members[slots]] = tg[slots]
    role[members[live]] = 1
    role[chosen[counted]] = 2
    dl = (unit * slope - sft) * factor
    if group_weights is not None:
        dl = dl * group_weights.double()[group_of]
    s_out, t_out = torch.where(lengths > 0, s_out, 0), torch.where(lengths > 0, t_out, 0)

    coef = torch.empty(0, dtype=torch.float32, device=device)
    if labels is not None:
        coef = torch.where(scored, dl.float()[token_sequence], 0.0)
    by_sequence = torch.stack([s_out, l, t_out, dl, role]).float()
    return (losses.sum() * factor).float(), losses.float(), by_sequence, lengths, coef


def _segment_of(
    total: int, segments: int, offsets: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Return the segment of each of `total` entries: equal rows, or between consecutive offsets."""
    if offsets is None:
        return torch.arange(total, device=device) // max(total // segments, 1)
    return torch.repeat_interleave(offsets.diff().long(), output_size=total)


def _members(
    S: int, group_size: int, cu_groups: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Return the sequences of each group, `[G, K]`, with -1 beyond a group's end."""
    if cu_groups is None:
        return torch.arange(S, device=device).view(-1, group_size)
    start, end = cu_groups[:-1, None].long(), cu_groups[1:, None].long()
    members = start + torch.arange(max(int((end - start).max()), 1), device=device)
    return torch.where(members < end, members, -1)


def _combine(
    ratios: torch.Tensor,
    weights: torch.Tensor | None,
    group_of: torch.Tensor,
    objective: RPOObjective,
) -> torch.Tensor:
    """Combine log-ratios `[R, S]` to several references into l - lref `[S]`."""
    if objective.reference not in ("harmonic", "geometric"):
        return ratios[0]
    alpha = torch.full_like(ratios, 1 / len(ratios))
    if weights is not None:
        alpha = weights.double()
        alpha = alpha[:, group_of] if alpha.dim() == 2 else alpha[:, None]
    if objective.reference == "harmonic":
        return torch.logsumexp(alpha.log() + ratios, 0)
    return torch.where(alpha == 0, 0, alpha * ratios).sum(0)


def _targets(
    S: int,
    objective: RPOObjective,
    rewards: torch.Tensor | None,
    members: torch.Tensor,
    device: torch.device,
) -> torch.Tensor:
    if rewards is not None:
        return objective.eta * rewards.double()
    gap = objective.label_gap if objective.label is not None else float(objective.target)
    t = torch.full((S,), -gap / 2, dtype=torch.float64, device=device)
    first = members[:, 0]
    t[first[first >= 0]] = gap / 2
    return t


def _roles(
    t: torch.Tensor, present: torch.Tensor, objective: RPOObjective
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the column of the chosen response of each group, and whether the group counts."""
    count = present.sum(1)
    counted = count >= (1 if objective.comparison == "pointwise" else 2)
    if objective.label is not None:
        counted &= count == 2
    if not objective.uses_rewards:
        return torch.zeros(len(t), dtype=torch.int64, device=t.device), counted & present[:, 0]
    top = torch.where(present, t, -math.inf).amax(1, keepdim=True)
    return (present & (t == top)).int().argmax(1), counted


def _distance(
    s: torch.Tensor, t: torch.Tensor, present: torch.Tensor, objective: RPOObjective
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return loss `[G]`, dloss/ds `[G, K]` (undefined where not present) and targets `[G, K]`."""
    k = present.sum(1, keepdim=True).clamp(min=1).double()
    if objective.comparison == "pointwise":
        weight = torch.ones_like(s)
        if objective.target == "softmax":
            log_q = _log_softmax(t, present)
            t, weight = k.log() + log_q, 1 + k * log_q.exp()
        value, slope = distance_of_gap(s, t, objective)
        return _total(weight * value / k, present), weight * slope / k, t

    d = s[:, :, None] - s[:, None, :]
    tau = torch.where(t[:, :, None] == t[:, None, :], 0, t[:, :, None] - t[:, None, :])
    pair = (
        present[:, :, None]
        & present[:, None, :]
        & ~torch.eye(s.shape[1], dtype=torch.bool, device=s.device)
    )
    is_listwise = objective.comparison == "listwise" and objective.label is None
    if is_listwise and objective.rules.softmax:
        log_p, log_q = _log_softmax(s, present), _log_softmax(t, present)
        pull = distance_pull(log_p, log_q, d - tau, objective)
        value = _total(distance_of_outcome(log_p, log_q, objective), present)
        return value, torch.where(pair, pull, 0).sum(2), t

    if objective.label is not None:
        label = torch.full_like(d, 1 - objective.label)
        label[:, 0] = objective.label
        value, slope = labelled(d, label, objective.cross_entropy)
    else:
        value, slope = distance_of_gap(d, tau, objective)
    value, slope = (
        _total(torch.where(pair, value, 0).sum(2), present),
        torch.where(pair, slope, 0).sum(2),
    )
    if not is_listwise:
        pairs = (k * (k - 1)).clamp(min=1)
        return value / pairs[:, 0], slope * 2 / pairs, t
    norm = 1 / (k - 1).clamp(min=1) ** 2
    if not objective.leave_one_out:
        norm = norm * (k - 1) / k
    return value / 2 * norm[:, 0], slope * norm, t


def _log_softmax(x: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """log-softmax over present members; infinite maxima share the mass."""
    x = torch.where(present, x, -math.inf)
    top = x.amax(1, keepdim=True)
    x = torch.where(top.isinf(), torch.where(present & (x == top), 0.0, -math.inf), x)
    return torch.log_softmax(x, 1)


def _total(x: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    return torch.where(present, x, 0).sum(1)
