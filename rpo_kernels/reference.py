"""Reference implementation, which the kernels are tested against: each quantity as it is defined.

Slow and simple on purpose: Python loops over sequences and groups, whole tensors in memory,
autograd for every gradient. It shares no code with the rest of the package, so that a mistake there
cannot hide here. It computes in the dtype of its inputs, at least float32: pass float64 to get
float64. Log-probabilities are in nats, implicit rewards in the units of the target rewards.

Shapes: N tokens, S sequences, G groups, K responses of one group, R references, V vocabulary, H
hidden. Sequences are rows of `[S, T]`, or packed `[N]` with `cu_seqlens` `[S+1]`. Groups are
contiguous: `group_size` responses each, or ragged with `cu_groups` `[G+1]`.

Source of the losses: Reward-aware Preference Optimization, arXiv 2502.00203. Its *backward* KL is
KL(target || policy).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rpo_kernels.objectives import RPOObjective


class ReferenceOutput(NamedTuple):
    """Result of a preference loss; unlike that of the fused functions, all of it has gradients."""

    loss: Tensor  # scalar, or [G] with reduction="none"
    losses: Tensor  # [G]; 0 for a group that does not count
    # [S] implicit rewards a_i (l_i - lref_i), without margin; 0 for a response without scored
    # tokens
    rewards: Tensor
    logps: Tensor  # [S] sums of token log-probabilities, in nats
    lengths: Tensor | None  # [S] scored tokens, int64; None if the caller gave none
    targets: Tensor  # [S] t_i in reward units; 0 for a response without scored tokens


# ---- tokens --------------------------------------------------------------------------------------


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """lp = log softmax(z)[label], z = softcap tanh(logit_scale logits / softcap) / temperature.

    `logits` [..., V], `labels` [...] -> [...], nats. Exactly 0, with zero gradient, where the label
    is `ignore_index`.
    """
    scored = labels != ignore_index
    # ignored rows are not selected, so an inf or NaN in one reaches no value or gradient
    logp = torch.log_softmax(_scaled(logits[scored], temperature, logit_scale, softcap), dim=-1)
    picked = logp.gather(-1, labels[scored].long().unsqueeze(-1)).squeeze(-1)
    return _spread(picked, scored)


def token_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """H = -sum_v p_v log p_v with p = softmax(z) as in `token_logps` and 0 log 0 = 0.

    `logits` [..., V], `labels` [...] -> [...], nats. Labels only tell which rows are scored.
    """
    scored = labels != ignore_index
    logp = torch.log_softmax(_scaled(logits[scored], temperature, logit_scale, softcap), dim=-1)
    p = logp.exp()
    # masking log p, not the product, also keeps 0 * -inf out of the gradient of p
    return _spread(-(p * logp.masked_fill(p == 0, 0.0)).sum(-1), scored)


def linear_token_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """`token_logps`, with its options, of logits = hidden weight^T + bias.

    `hidden` [..., H], `weight` [V, H], `bias` [V], `labels` [...] -> [...], nats.
    """
    logits = _linear(hidden, weight, bias, labels, options.get("ignore_index", -100))
    return token_logps(logits, labels, **options)


# ---- sequences -----------------------------------------------------------------------------------


def sequence_logps(
    token_logps: Tensor,
    labels: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
    ignore_index: int = -100,
) -> Tensor:
    """l_i = sum_t m_it lp_it, or its mean over the scored tokens with `average`.

    `token_logps` [S, T], or [N] with `cu_seqlens` -> [S], nats. Without `labels` every token is
    scored. A sequence without scored tokens has l_i = 0.
    """
    token_logps = _promoted(token_logps)
    sums = []
    masks = _scored_positions(token_logps, labels, cu_seqlens, ignore_index)
    for tokens, scored in zip(_sequences(token_logps, cu_seqlens), masks, strict=True):
        total = tokens[scored].sum()
        sums.append(total / max(int(scored.sum()), 1) if average else total)
    return _stack(sums, token_logps)


def sequence_lengths(
    labels: Tensor, *, cu_seqlens: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """n_i = sum_t m_it, the number of scored tokens.

    `labels` [S, T], or [N] with `cu_seqlens` -> [S], int64.
    """
    counts = [int((row != ignore_index).sum()) for row in _sequences(labels, cu_seqlens)]
    return torch.tensor(counts, dtype=torch.int64, device=labels.device)


def log_ratios(
    logps: Tensor,
    objective: RPOObjective,
    *,
    ref_logps: Tensor | None = None,
    ref_weights: Tensor | None = None,
    labels: Tensor | None = None,
    group_size: int = 2,
    cu_groups: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """h_i = l_i - lref_i, with the objective's combination of references.

        single      l_i - lref_i
        none        l_i
        harmonic    logsumexp_k(log alpha_k + l_i - lref_ik)
                    lref = -logsumexp_k(log alpha_k - lref_k)
        geometric   sum_k alpha_k (l_i - lref_ik)
                    lref = sum_k alpha_k lref_k

    MRPO (arXiv 2405.16388) combines several references harmonically, per sequence.

    `logps` [S], or per token in the shape of `labels` if those are given -> [S], nats. `ref_logps`
    [S] or, with labels, in their shape; a leading R for harmonic and geometric. `ref_weights` alpha
    [R] or [R, G], with columns of sum 1; uniform if None. Per-token references are subtracted
    before the sum over tokens: the difference of two large sums loses digits.
    """
    logps = _promoted(logps)
    ratios = _log_ratios(
        logps,
        objective,
        ref_logps,
        ref_weights,
        labels,
        group_size,
        cu_groups,
        cu_seqlens,
        ignore_index,
    )
    return _stack(ratios, logps)


# ---- losses --------------------------------------------------------------------------------------


def preference_loss(
    logps: Tensor,
    rewards: Tensor | None,
    objective: RPOObjective | Sequence[tuple[float, RPOObjective]],
    *,
    ref_logps: Tensor | None = None,
    ref_weights: Tensor | None = None,
    lengths: Tensor | None = None,
    group_size: int = 2,
    cu_groups: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    group_weights: Tensor | None = None,
) -> ReferenceOutput:
    """L = mean_g w_g [ scale D[s || t] + sft_weight NLL(chosen) ] from sequence log-probabilities.

    `logps` [S] sums in nats (never averages: `objective.average` divides by `lengths`), `rewards`
    [S] explicit rewards r* or None, `ref_logps` [S] or [R, S], `lengths` [S] scored tokens. A
    response without scored tokens is dropped from its group. A group that is left with fewer than
    two (pointwise: none), or that has no rewards and lost its first response, has loss 0, no
    gradient, and does not count. `group_weights` [G] are factors on the groups' losses. A sum of
    objectives, pairs (weight, objective), is the weighted sum of their losses.
    """
    if isinstance(objective, Sequence):
        options = {name: x for name, x in locals().items() if name != "objective"}
        return _sum_of(objective, lambda part: preference_loss(objective=part, **options))
    logps = _promoted(logps)
    ratios = _log_ratios(
        logps, objective, ref_logps, ref_weights, None, group_size, cu_groups, None, -100
    )
    groups = _groups(len(logps), group_size, cu_groups)
    return _loss(
        logps, ratios, rewards, objective, lengths, groups, reduction, normalizer, group_weights
    )


def rpo_loss(
    logits: Tensor,
    labels: Tensor,
    rewards: Tensor | None,
    objective: RPOObjective | Sequence[tuple[float, RPOObjective]],
    *,
    ref_logps: Tensor | None = None,
    ref_weights: Tensor | None = None,
    group_size: int = 2,
    cu_groups: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    group_weights: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> ReferenceOutput:
    """`preference_loss` of the sequences in `logits` [S, T, V] (packed [N, V]).

    `labels` [S, T] (packed [N]). `ref_logps` [S] or in the shape of `labels`; with several
    references [R, S] or [R, *labels.shape].
    """
    if isinstance(objective, Sequence):
        options = {name: x for name, x in locals().items() if name != "objective"}
        return _sum_of(objective, lambda part: rpo_loss(objective=part, **options))
    tokens = token_logps(
        logits,
        labels,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
    )
    logps = sequence_logps(tokens, labels, cu_seqlens=cu_seqlens, ignore_index=ignore_index)
    lengths = sequence_lengths(labels, cu_seqlens=cu_seqlens, ignore_index=ignore_index)
    ratios = _log_ratios(
        tokens,
        objective,
        ref_logps,
        ref_weights,
        labels,
        group_size,
        cu_groups,
        cu_seqlens,
        ignore_index,
    )
    groups = _groups(len(logps), group_size, cu_groups)
    return _loss(
        logps, ratios, rewards, objective, lengths, groups, reduction, normalizer, group_weights
    )


def linear_rpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rewards: Tensor | None,
    objective: RPOObjective | Sequence[tuple[float, RPOObjective]],
    *,
    bias: Tensor | None = None,
    **options: Any,
) -> ReferenceOutput:
    """`rpo_loss`, with its options, of logits = hidden weight^T + bias.

    `hidden` [S, T, H] (packed [N, H]), `weight` [V, H], `bias` [V].
    """
    logits = _linear(hidden, weight, bias, labels, options.get("ignore_index", -100))
    return rpo_loss(logits, labels, rewards, objective, **options)


def _sum_of(
    objective: Sequence[tuple[float, RPOObjective]],
    output_of: Callable[[RPOObjective], ReferenceOutput],
) -> ReferenceOutput:
    """Losses of a weighted sum of objectives; the other fields are those of its first part."""
    outputs = [output_of(part) for _, part in objective]
    weights = [weight for weight, _ in objective]
    return outputs[0]._replace(
        loss=_sum(w * x.loss for w, x in zip(weights, outputs, strict=True)),
        losses=_sum(w * x.losses for w, x in zip(weights, outputs, strict=True)),
    )


def _loss(
    logps: Tensor,
    ratios: list[Tensor],
    rewards: Tensor | None,
    objective: RPOObjective,
    lengths: Tensor | None,
    groups: list[range],
    reduction: str,
    normalizer: float | Tensor | None,
    group_weights: Tensor | None,
) -> ReferenceOutput:
    """Compute the loss from sequence log-probabilities l_i and log-ratios h_i = l_i - lref_i."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(
            f"reference: `reduction` must be 'mean', 'sum' or 'none', got {reduction!r}"
        )
    if reduction == "none" and normalizer is not None:
        raise ValueError(
            "reference: `normalizer` divides the sum of the losses, but `reduction` is 'none'; "
            "pass None"
        )
    has_own_target = objective.label is not None or not isinstance(objective.target, str)
    if rewards is None and not has_own_target:
        raise ValueError("reference: `rewards` must be a tensor [S] for this objective, got None")
    needs_lengths = objective.average or (
        objective.sft_weight > 0 and objective.sft_normalizer != "sum"
    )
    if lengths is None and needs_lengths:
        raise ValueError("reference: `lengths` must be a tensor [S] for this objective, got None")

    n = [1] * len(logps) if lengths is None else lengths.tolist()
    r = None if rewards is None or has_own_target else rewards.to(logps)
    zero = logps[:0].sum()  # 0 with a graph: backward works even if no group counts

    # implicit rewards and targets of each response
    implicit_rewards = [zero] * len(logps)
    targets = [zero.detach()] * len(logps)
    weights = [1.0] * len(logps)
    margins = [0.0] * len(logps)
    chosen: list[int | None] = []
    kept: list[list[int]] = []
    for group in groups:
        members = [i for i in group if n[i] > 0]
        kept.append(members)
        for i, t, w in zip(members, *_targets(objective, r, group, members, logps), strict=True):
            targets[i], weights[i] = t, w
        chosen.append(_chosen(targets, group, members, has_own_target))
        for i in members:
            a = objective.beta / n[i] if objective.average else objective.beta
            implicit_rewards[i] = a * ratios[i]
            margins[i] = objective.margin if i == chosen[-1] else 0.0
    implicit, t = _stack(implicit_rewards, logps), _stack(targets, logps)
    s = implicit - logps.new_tensor(margins)

    # a group counts if enough of its responses remain to compare
    counted = []
    for members, best in zip(kept, chosen, strict=True):
        if objective.label is not None:
            enough = len(members) == 2
        else:
            enough = len(members) >= (1 if objective.comparison == "pointwise" else 2)
        counted.append(enough and best is not None)

    chosen_tokens = sum(
        n[best] for best, counts in zip(chosen, counted, strict=True) if counts and best is not None
    )
    by_group = []
    for members, best, counts in zip(kept, chosen, counted, strict=True):
        if not counts or best is None:
            by_group.append(zero)
            continue
        loss = objective.scale * _distance(
            objective, s[members], t[members], [weights[i] for i in members]
        )
        if objective.sft_weight > 0:
            nll = -logps[best]
            if objective.sft_normalizer == "mean":
                nll = nll / n[best]
            elif objective.sft_normalizer == "tokens":
                # so that the mean over counted groups is the mean over the batch's chosen tokens
                nll = nll * sum(counted) / chosen_tokens
            loss = loss + objective.sft_weight * nll
        by_group.append(loss)
    losses = _stack(by_group, logps)
    if group_weights is not None:
        losses = losses * group_weights.to(logps)

    if reduction == "none":
        loss = losses
    elif normalizer is not None:
        loss = losses.sum() / normalizer
    elif reduction == "sum":
        loss = losses.sum()
    else:
        loss = losses.sum() / max(sum(counted), 1)
    return ReferenceOutput(loss, losses, implicit, logps, lengths, t)


# ---- targets -------------------------------------------------------------------------------------


def _targets(
    objective: RPOObjective, rewards: Tensor | None, group: range, members: list[int], like: Tensor
) -> tuple[list[Tensor], list[float]]:
    """Return targets t_i and pointwise weights w_i of the remaining responses of a group."""
    if objective.label is not None or not isinstance(objective.target, str):
        gap = float(objective.target) if objective.label is None else _log_odds(objective.label)
        return [like.new_tensor(gap / 2 if i == group[0] else -gap / 2) for i in members], [
            1.0
        ] * len(members)
    if not members or rewards is None:
        return [], []
    t = objective.eta * rewards[members]
    if objective.target == "rewards":
        return list(t), [1.0] * len(members)
    K, q = len(members), _softmax(t)
    return list(torch.log(K * q)), (1 + K * q).tolist()


def _log_odds(q: float) -> float:
    """log(q / (1-q)): infinite at 0 and 1, NaN outside [0, 1]."""
    if q == 0:
        return -math.inf
    if q == 1:
        return math.inf
    return math.log(q) - math.log1p(-q) if 0 < q < 1 else math.nan


def _chosen(
    targets: list[Tensor], group: range, members: list[int], has_own_target: bool
) -> int | None:
    """Return the remaining response with the largest target, the first of equal ones.

    Without rewards it is the group's first response, or None if that was dropped.
    """
    if not members:
        return None
    if has_own_target:
        return group[0] if group[0] in members else None
    best = members[0]
    for i in members:
        if targets[i] > targets[best]:
            best = i
    return best


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(operator.add, terms)


def _softmax(t: Tensor) -> Tensor:
    """softmax [K] -> [K] in which several +inf share the mass equally."""
    e = torch.stack([_gap(x, t.max()).exp() for x in t])
    return e / e.sum()


def _gap(a: Tensor, b: Tensor) -> Tensor:
    """a - b, 0 for equal infinities."""
    return torch.zeros_like(a) if a == b else a - b


# ---- distances -----------------------------------------------------------------------------------


def _distance(objective: RPOObjective, s: Tensor, t: Tensor, weights: list[float]) -> Tensor:
    """D[s || t] of one group; `s`, `t` [K] -> scalar."""
    if objective.distance in ("squared", "forward_kl") and bool(t.isinf().any()):
        raise ValueError(
            f"reference: distance {objective.distance!r} must have finite targets, got an "
            "infinite target; use 'backward_kl' or 'hellinger'"
        )
    if objective.label is not None:
        q = objective.label
        entropy = sum(-x * math.log(x) for x in (q, 1 - q) if x > 0)
        return _bernoulli_backward_kl(objective, s[0] - s[1], q, 1 - q, entropy)
    if objective.comparison == "listwise":
        return _listwise_distance(objective, s, t)
    if objective.comparison == "pairwise":
        pairs = [(i, j) for j in range(len(s)) for i in range(j)]
        return _sum(
            _scalar_distance(objective, s[i] - s[j], _gap(t[i], t[j])) for i, j in pairs
        ) / len(pairs)
    return _sum(
        w * _scalar_distance(objective, x, y) for w, x, y in zip(weights, s, t, strict=True)
    ) / len(s)


def _scalar_distance(objective: RPOObjective, d: Tensor, tau: Tensor) -> Tensor:
    """D[d || tau] with p = sigmoid(d), q = sigmoid(tau), A = softplus.

        squared       1/2 (d - tau)^2
        backward_kl   KL(B(q) || B(p)) = CE - H(q), CE = q A(-d) + (1-q) A(d)
        forward_kl    KL(B(p) || B(q)) = p log p/q + (1-p) log (1-p)/(1-q)
        hellinger     4 (1 - sqrt(p q) - sqrt((1-p) (1-q)))

    All are scalars.
    """
    if objective.distance == "squared":
        return (d - tau) ** 2 / 2
    if objective.distance == "backward_kl":
        q, not_q = torch.sigmoid(tau), torch.sigmoid(-tau)
        entropy = _weighted(q, _softplus(-tau)) + _weighted(not_q, _softplus(tau))
        return _bernoulli_backward_kl(objective, d, q, not_q, entropy)
    if objective.distance == "hellinger":
        log_p, log_q = [(-_softplus(-x), -_softplus(x)) for x in (d, tau)]
        return _at_least_zero(4 - 4 * _sum(((a + b) / 2).exp() for a, b in zip(log_p, log_q)))
    p, not_p = torch.sigmoid(d), torch.sigmoid(-d)
    return _at_least_zero(
        p * (_softplus(-tau) - _softplus(-d)) + not_p * (_softplus(tau) - _softplus(d))
    )


def _bernoulli_backward_kl(
    objective: RPOObjective,
    d: Tensor,
    q: Tensor | float,
    not_q: Tensor | float,
    entropy: Tensor | float,
) -> Tensor:
    """CE = q A(-d) + (1-q) A(d), or KL = CE - H(q); in the first, q may lie outside [0, 1]."""
    cross_entropy = _weighted(q, _softplus(-d)) + _weighted(not_q, _softplus(d))
    return cross_entropy if objective.cross_entropy else _at_least_zero(cross_entropy - entropy)


def _listwise_distance(objective: RPOObjective, s: Tensor, t: Tensor) -> Tensor:
    """D over a whole group with p = softmax(s), q = softmax(t).

        squared       mean_i 1/2 (a_i - b_i)^2,  b_i as a_i for t
                      a_i = s_i - mean_{j != i} s_j = K/(K-1) (s_i - sbar)
        backward_kl   KL(q || p) = CE - H(q), CE = -sum_i q_i log p_i
        forward_kl    KL(p || q)
        hellinger     2 sum_i (sqrt p_i - sqrt q_i)^2

    `s`, `t` [K] -> scalar.
    """
    K = len(s)
    if objective.distance == "squared":
        total = s.new_zeros(())
        for i in range(K):
            others = [j for j in range(K) if j != i]
            total = total + ((s[i] - s[others].mean()) - (t[i] - t[others].mean())) ** 2 / 2
        # times (K-1)/K this is 1/2 the unbiased variance of s - t
        return total / K if objective.leave_one_out else total / K * (K - 1) / K
    log_p = _log_softmax(s)
    if objective.distance == "forward_kl":
        return _at_least_zero((log_p.exp() * (log_p - _log_softmax(t))).sum())
    q = _softmax(t)
    if objective.distance == "hellinger":
        return _at_least_zero(4 - 4 * ((log_p / 2).exp() * q.sqrt()).sum())
    some = q > 0
    cross_entropy = -(q[some] * log_p[some]).sum()
    entropy = -(q[some] * q[some].log()).sum()
    return cross_entropy if objective.cross_entropy else _at_least_zero(cross_entropy - entropy)


def _softplus(x: Tensor) -> Tensor:
    """A(x) = max(x, 0) + log1p(exp(-|x|)), with slope 1/2 at 0.

    torch's softplus is linear above 20, which is off by 2e-9.
    """
    return torch.logaddexp(x, torch.zeros_like(x))


def _log_softmax(s: Tensor) -> Tensor:
    """log p_i = -A(logsumexp_{j != i} s_j - s_i) for K > 1, [K] -> [K].

    It keeps all digits even where p_i is close to 1.
    """
    others = [[j for j in range(len(s)) if j != i] for i in range(len(s))]
    return torch.stack(
        [-_softplus(torch.logsumexp(s[o], dim=0) - x) for x, o in zip(s, others, strict=True)]
    )


def _weighted(weight: Tensor | float, x: Tensor) -> Tensor:
    """weight * x with 0 * inf := 0, in value and gradient."""
    return weight * x if weight != 0 else torch.zeros_like(x)


def _at_least_zero(kl: Tensor) -> Tensor:
    """max(kl, 0) in value, kl in gradient: near its optimum, rounding can make a KL negative."""
    return kl - kl.detach().clamp(max=0)


# ---- shapes --------------------------------------------------------------------------------------


def _log_ratios(
    logps: Tensor,
    objective: RPOObjective,
    ref_logps: Tensor | None,
    ref_weights: Tensor | None,
    labels: Tensor | None,
    group_size: int,
    cu_groups: Tensor | None,
    cu_seqlens: Tensor | None,
    ignore_index: int,
) -> list[Tensor]:
    """`log_ratios` as a list, so that an unused response gets no gradient instead of 0 * NaN."""
    if labels is None:
        policy = [x.unsqueeze(0) for x in logps]
        scored = [torch.ones(1, dtype=torch.bool, device=logps.device)] * len(policy)
    else:
        policy = _sequences(logps, cu_seqlens)
        scored = _scored_positions(logps, labels, cu_seqlens, ignore_index)
    if objective.reference == "none":
        return [x[m].sum() for x, m in zip(policy, scored, strict=True)]
    if ref_logps is None:
        raise ValueError(
            "reference: `ref_logps` must be a tensor for an objective with "
            f"reference={objective.reference!r}, got None"
        )

    several = objective.reference in ("harmonic", "geometric")
    refs = list(ref_logps.to(logps.dtype)) if several else [ref_logps.to(logps.dtype)]
    for ref in refs:
        if ref.shape not in {(len(policy),), logps.shape}:
            expected = f"{'[R, S]' if several else '[S]'} or per token with labels"
            raise ValueError(
                f"reference: `ref_logps` must be {expected}, got shape {tuple(ref_logps.shape)}"
            )

    groups = _groups(len(policy), group_size, cu_groups)
    group_of = {i: g for g, group in enumerate(groups) for i in group}
    alpha = torch.full((len(refs),), 1 / len(refs)) if ref_weights is None else ref_weights
    alpha = (
        alpha.to(logps) if alpha.ndim == 2 else alpha.to(logps).unsqueeze(1).expand(-1, len(groups))
    )

    ratios = []
    for i, (x, m) in enumerate(zip(policy, scored, strict=True)):
        each = []
        for ref in refs:
            if labels is not None and ref.shape == labels.shape:
                each.append((x[m] - _sequences(ref, cu_seqlens)[i][m]).sum())
            else:
                each.append(x[m].sum() - ref[i])
        h = torch.stack(each)
        if objective.reference == "single":
            ratios.append(h[0])
        elif objective.reference == "harmonic":
            ratios.append(torch.logsumexp(alpha[:, group_of[i]].log() + h, dim=0))
        else:
            ratios.append((alpha[:, group_of[i]] * h).sum())
    return ratios


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """Split [S, T] or packed [N] into S vectors."""
    if cu_seqlens is not None:
        if x.ndim != 1:
            raise ValueError(f"reference: packed tokens must be [N], got shape {tuple(x.shape)}")
        edges = torch.as_tensor(cu_seqlens).tolist()
        return [x[start:stop] for start, stop in pairwise(edges)]
    if x.ndim != 2:
        raise ValueError(
            "reference: tokens must be [S, T], or [N] with `cu_seqlens`; got shape "
            f"{tuple(x.shape)}"
        )
    return list(x)


def _scored_positions(
    tokens: Tensor, labels: Tensor | None, cu_seqlens: Tensor | None, ignore_index: int
) -> list[Tensor]:
    """Return the mask m_it of each sequence; without labels every token is scored."""
    mask = torch.ones_like(tokens, dtype=torch.bool) if labels is None else labels != ignore_index
    if mask.shape != tokens.shape:
        raise ValueError(
            f"reference: `labels` must have shape {tuple(tokens.shape)}, got {tuple(mask.shape)}"
        )
    return _sequences(mask, cu_seqlens)


def _groups(responses: int, group_size: int, cu_groups: Tensor | None) -> list[range]:
    """Return the responses of each group."""
    edges = (
        range(0, responses + 1, group_size)
        if cu_groups is None
        else torch.as_tensor(cu_groups).tolist()
    )
    if edges[-1] != responses:
        raise ValueError(
            f"reference: `cu_groups` must end at the number of responses, {responses}; got "
            f"{edges[-1]}"
        )
    return [range(start, stop) for start, stop in pairwise(edges)]


def _scaled(
    logits: Tensor, temperature: float, logit_scale: float, softcap: float | None
) -> Tensor:
    """z = softcap tanh(logit_scale logits / softcap) / temperature.

    Without a softcap z = logit_scale logits / temperature.
    """
    z = logit_scale * _promoted(logits)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def _linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int
) -> Tensor:
    """hidden weight^T + bias at the scored positions; zeros, which are not read, at the others."""
    scored = labels != ignore_index
    rows = _promoted(hidden[scored]) @ _promoted(weight).T
    if bias is not None:
        rows = rows + _promoted(bias)
    return rows.new_zeros(*labels.shape, len(weight)).masked_scatter(scored.unsqueeze(-1), rows)


def _promoted(x: Tensor) -> Tensor:
    """Promote to at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _spread(values: Tensor, scored: Tensor) -> Tensor:
    """Put values at the scored positions and exact zeros elsewhere."""
    return torch.zeros(scored.shape, dtype=values.dtype, device=values.device).masked_scatter(
        scored, values
    )


def _stack(scalars: Sequence[Tensor], like: Tensor) -> Tensor:
    """Stack scalars to a vector; an empty one has the dtype and device of `like`."""
    return torch.stack(list(scalars)) if scalars else like.new_zeros(0)
