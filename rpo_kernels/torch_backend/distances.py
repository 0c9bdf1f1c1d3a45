"""Distances between gaps of implicit and target rewards in float64, in their textbook forms.

The functions are those of `kernels.distances`, under the same names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..objectives import RPOObjective


def distance_of_gap(d: Tensor, tau: Tensor, objective: RPOObjective) -> tuple[Tensor, Tensor]:
    """Return D[d || tau] and its derivative in d."""
    return _function(objective, "of_gap")(d, tau, objective.cross_entropy)


def distance_of_outcome(log_p: Tensor, log_q: Tensor, objective: RPOObjective) -> Tensor:
    """Return the term of one outcome in D between softmaxes p and q."""
    return _function(objective, "of_outcome")(log_p, log_q, objective.cross_entropy)


def distance_pull(log_p: Tensor, log_q: Tensor, gap: Tensor, objective: RPOObjective) -> Tensor:
    """Return what response j adds to dD/ds_i, `[G, K, K]`; log-probabilities are `[G, K]`."""
    i, j = (..., slice(None), None), (..., None, slice(None))
    return _function(objective, "pull")(log_p[i], log_q[i], log_p[j], log_q[j], gap)


def _function(objective: RPOObjective, suffix: str) -> Callable:
    return getattr(sys.modules[__name__], f"{objective.distance}_{suffix}")


def squared_of_gap(d: Tensor, tau: Tensor, _: bool) -> tuple[Tensor, Tensor]:
    return (d - tau) ** 2 / 2, d - tau


def backward_kl_of_gap(d: Tensor, tau: Tensor, cross_entropy: bool) -> tuple[Tensor, Tensor]:
    return _both_outcomes(backward_kl_of_outcome, d, tau, cross_entropy), (
        torch.sigmoid(d) - torch.sigmoid(tau)
    )


def backward_kl_of_outcome(log_p: Tensor, log_q: Tensor, cross_entropy: bool) -> Tensor:
    q = log_q.exp()
    if cross_entropy:
        return torch.where(q == 0, 0, -q * log_p)
    return kl_term(log_q, log_p)


def backward_kl_pull(
    log_p_i: Tensor, log_q_i: Tensor, log_p_j: Tensor, log_q_j: Tensor, gap: Tensor
) -> Tensor:
    return (log_p_i + log_q_j).exp() - (log_q_i + log_p_j).exp()


def forward_kl_of_gap(d: Tensor, tau: Tensor, _: bool) -> tuple[Tensor, Tensor]:
    slope = torch.sigmoid(d) * torch.sigmoid(-d) * (d - tau)
    return _both_outcomes(forward_kl_of_outcome, d, tau), slope


def forward_kl_of_outcome(log_p: Tensor, log_q: Tensor, _: bool = False) -> Tensor:
    return kl_term(log_p, log_q)


def forward_kl_pull(
    log_p_i: Tensor, log_q_i: Tensor, log_p_j: Tensor, log_q_j: Tensor, gap: Tensor
) -> Tensor:
    return (log_p_i + log_p_j).exp() * gap


def hellinger_of_gap(d: Tensor, tau: Tensor, _: bool) -> tuple[Tensor, Tensor]:
    p, q = ((F.logsigmoid(x), F.logsigmoid(-x)) for x in (d, tau))
    slope = hellinger_pull(p[0], q[0], p[1], q[1], None)
    return _both_outcomes(hellinger_of_outcome, d, tau), slope


def hellinger_of_outcome(log_p: Tensor, log_q: Tensor, _: bool = False) -> Tensor:
    return 2 * ((log_p / 2).exp() - (log_q / 2).exp()) ** 2


def hellinger_pull(
    log_p_i: Tensor, log_q_i: Tensor, log_p_j: Tensor, log_q_j: Tensor, gap: Tensor | None
) -> Tensor:
    a, b = log_p_i + (log_p_j + log_q_j) / 2, log_p_j + (log_p_i + log_q_i) / 2
    return 2 * (a.exp() - b.exp())


def kl_term(log_q: Tensor, log_p: Tensor) -> Tensor:
    """q log(q / p) - q + p >= 0; summed over outcomes it is KL(q || p). p where q = 0."""
    q, p = log_q.exp(), log_p.exp()
    return torch.where(q == 0, p, q * (log_q - log_p) - q + p).clamp(min=0)


def labelled(d: Tensor, label: Tensor, cross_entropy: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy (or KL) of a pair with an explicit label, and its derivative."""
    yes = torch.where(label == 0, 0, -label * F.logsigmoid(d))
    value = yes + torch.where(label == 1, 0, -(1 - label) * F.logsigmoid(-d))
    if not cross_entropy:
        entropy = torch.special.xlogy(label, label) + torch.special.xlogy(1 - label, 1 - label)
        value = (value + entropy).clamp(min=0)
    return value, torch.sigmoid(d) - label


def _both_outcomes(
    of_outcome: Callable[..., Tensor], d: Tensor, tau: Tensor, *options: bool
) -> Tensor:
    """D between the Bernoulli distributions of sigmoid(d) and sigmoid(tau)."""
    yes, no = (
        of_outcome(F.logsigmoid(sign * d), F.logsigmoid(sign * tau), *options) for sign in (1, -1)
    )
    return yes + no
