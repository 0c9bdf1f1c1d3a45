"""Expected results in float64, and how far arithmetic in the case's dtype may deviate from them.

Log-probabilities are checked in all scored rows; gradients in a sample of rows, and of rows of the
weight, by the norms of their errors. The bounds allow a provider to round logits, their gradient
and any sum of up to 1,024 terms to the dtype of its inputs. With u the unit roundoff of that dtype,
and u32 that of fp32:

    |dz|       <= u max|z| + 4 sqrt(H) u32 |hidden| |weight|          (from hidden states)
    |dlogp|    <= 2 |dz| + u |logp| + 32 u32 (max|z| + log V)
    |dcoef|    <= b / 2G max sqrt(sum (b |dlogp|)^2)                  (of a loss)
    |dentropy| <= 64 u32 (max|z| + log V)
    |ddlogits| <= |coef| ((2 u + |dlogp|) |onehot - p| + 32 u32 (max|z| + log V) onehot)
                  + |dcoef| |onehot - p|
    ||ddhidden|| <= 2 ||sqrt(|ddlogits|^2 weight^2)|| + 32 u ||dhidden||,   dweight alike

where from logits |dlogp| lacks dz and u (fp32 inside, fp32 out), b is the factor of a token's
log-probability in the loss, the sum of |dcoef| is over the tokens of a response, and, errors of
different logits being independent, ||ddhidden|| <= 2 ||sqrt(|ddlogits|^2 weight^2)|| + 32 u
||dhidden||, dweight alike.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from cases import KTO_BASELINE, Case, Inputs
from torch import Tensor

from rpo_kernels import reference

CHUNK_ELEMENTS = 1 << 27  # logits in float64 at a time: 1 GiB
SAMPLED_ROWS, SAMPLED_COLUMNS = 64, 128


class Sample(NamedTuple):
    """A sample of a gradient."""

    index: Tensor  # rows of the flat gradient
    value: Tensor  # float64
    bound: float  # on the norm of the error


class Truth(NamedTuple):
    logps: Tensor  # [S, T] float64, 0 where not scored
    logps_bound: Tensor  # [S, T]
    entropies: Tensor  # [S, T] float64, 0 where not scored
    loss: float | None
    loss_bound: float
    gradients: dict[str, Sample]


def truth_of(case: Case, x: Inputs) -> Truth:
    half, single = torch.finfo(case.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    from_logits = case.part.start == "logits"
    labels = x.labels.flatten()
    scored = (labels >= 0).nonzero()[:, 0]
    V, H = case.model.V, case.model.H
    rows = x.logits.flatten(0, 1) if from_logits else x.hidden.flatten(0, 1)
    weight = None if from_logits else x.weight.double()

    def logits_of(index: Tensor) -> Tensor:
        if not from_logits:
            return rows[index].double() @ weight.t()
        z, cap = rows[index].double(), case.part.softcap
        return cap * torch.tanh(z / cap) if cap else z

    logps, entropies, lse, peak, work = torch.zeros(
        5, labels.numel(), dtype=torch.float64, device=labels.device
    )
    for index in scored.split(max(1, CHUNK_ELEMENTS // V)):
        z = logits_of(index)
        logps[index] = reference.token_logps(z, labels[index])
        if case.part.entropy:
            entropies[index] = reference.token_entropy(z, labels[index])
        lse[index], peak[index] = z.logsumexp(-1), z.abs().amax(-1)
        if not from_logits:
            largest = weight.norm(dim=1).max()  # |hidden| |weight| <= the product of the norms
            work[index] = 4 * math.sqrt(H) * single * rows[index].double().norm(dim=1) * largest
    in_fp32 = 32 * single * (peak + math.log(V))
    logps_bound = in_fp32.clone()
    if not from_logits:
        logps_bound += 2 * (half * peak + work) + half * logps.abs()
    logps_bound[labels < 0] = 0

    coef, loss, loss_bound = x.upstream.flatten().double(), None, 0.0
    coef_bound = torch.zeros_like(logps)[:, None]
    if case.part.loss:
        shape = x.labels.shape
        sums = logps.view(shape).sum(1).requires_grad_()
        out, b = loss_of(case, sums, x)
        (slope,) = torch.autograd.grad(out, sums)
        coef = slope.repeat_interleave(case.length)
        loss = out.item()
        loss_bound = 2 * float((coef.abs() * logps_bound).sum()) + 64 * single * (1 + abs(loss))
        largest = float((b * logps_bound.view(shape).norm(dim=1)).max())
        groups = case.sequences // case.part.group_size
        coef_bound = (b / (2 * groups) * largest).repeat_interleave(case.length)[:, None]

    def dlogits(index: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return dL/dlogits and its bounds, [rows, columns]."""
        if columns is None:
            z, columns = logits_of(index), torch.arange(V, device=labels.device)
        else:
            z = rows[index].double() @ weight[columns].t()
        p = (z - lse[index, None]).exp()
        hit = (labels[index, None] == columns).double()
        c = coef[index, None]
        error = (c.abs() * (2 * half + logps_bound[index, None]) + coef_bound[index]) * (
            hit - p
        ).abs()
        error += c.abs() * in_fp32[index, None] * hit
        return c * (hit - p), error

    gradients = {}
    spread = scored[
        torch.linspace(0, len(scored) - 1, min(SAMPLED_ROWS, len(scored)), device=labels.device)
        .round()
        .long()
    ]
    sums_bound = lambda value, squares: float(2 * squares.sum().sqrt() + 32 * half * value.norm())
    if "logits" in case.part.trains:
        value, error = dlogits(spread)
        gradients["logits"] = Sample(spread, value, float(error.norm()))
    if "hidden" in case.part.trains:
        value, error = dlogits(spread)
        value = value @ weight
        gradients["hidden"] = Sample(
            spread, value, sums_bound(value, error.square() @ weight.square())
        )
    if "weight" in case.part.trains:
        # columns of labels, whose gradients are large, and others
        columns = torch.cat(
            [labels[spread], torch.arange(0, V, -(-V // SAMPLED_COLUMNS), device=labels.device)]
        ).unique()
        value = squares = 0
        for index in scored.split(max(1, CHUNK_ELEMENTS // (len(columns) + H))):
            d, e = dlogits(index, columns)
            h = rows[index].double()
            value, squares = value + d.t() @ h, squares + e.square().t() @ h.square()
        gradients["weight"] = Sample(columns, value, sums_bound(value, squares))
    by_row = (y.view(x.labels.shape) for y in (logps, logps_bound, entropies))
    return Truth(*by_row, loss, loss_bound, gradients)


def loss_of(case: Case, sums: Tensor, x: Inputs) -> tuple[Tensor, Tensor]:
    """The loss of sequence log-probabilities `[S]` in float64, and the factor of each in it."""
    counts = torch.tensor(x.counts, device=sums.device)
    b = torch.full_like(sums.detach(), case.beta)
    if case.part.loss == "kto":
        gain = case.beta * (sums - KTO_BASELINE)
        value = torch.cat([1 - torch.sigmoid(gain[::2]), 1 - torch.sigmoid(-gain[1::2])])
        return value.mean(), b
    has_reference = case.objective.reference != "none"
    out = reference.preference_loss(
        sums,
        x.rewards.double(),
        case.objective,
        ref_logps=torch.zeros_like(sums) if has_reference else None,
        lengths=counts,
        group_size=case.part.group_size,
    )
    return out.loss, b / counts if case.objective.average else b
