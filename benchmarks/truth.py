"""Expected results in float64, and how far arithmetic in the case's dtype may deviate from them.

Log-probabilities are checked in all scored rows; gradients in a sample of rows, and of rows of the
weight, by the norms of their errors. The bounds allow a provider to round logits, their gradient
and any sum of up to 1,024 terms to the dtype of its inputs. With u the unit roundoff of that dtype,
and u32 that of fp32:

    |dz|       <= u max|z| + 4 sqrt(H) u32 |hidden| |weight|          (from hidden states)
    |dlogp|    <= 2 |dz| + u |logp| + 32 u32 (max|z| + log V)
    |dcoef|    <= beta / 2G max sqrt(sum (beta |dlogp|)^2)            (of a loss)
    |ddlogits| <= |coef| ((2 u + |dlogp|) |onehot - p| + 32 u32 (max|z| + log V) onehot)
                  + |dcoef| |onehot - p|
    ||ddhidden|| <= 2 ||sqrt(|ddlogits|^2 weight^2)|| + 32 u ||dhidden||,   dweight alike

From logits, |dlogp| has no terms with dz and u (fp32 inside and out). The sum of |dcoef| is over
the tokens of a response. The last line assumes independent errors of different logits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from cases import SEQUENCES, Case, Inputs
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
        return rows[index].double() if from_logits else rows[index].double() @ weight.t()

    logps, lse, peak, work = torch.zeros(
        4, labels.numel(), dtype=torch.float64, device=labels.device
    )
    for index in scored.split(max(1, CHUNK_ELEMENTS // V)):
        z = logits_of(index)
        logps[index] = reference.token_logps(z, labels[index])
        lse[index], peak[index] = z.logsumexp(-1), z.abs().amax(-1)
        if not from_logits:
            largest = weight.norm(dim=1).max()  # |hidden| |weight| <= the product of the norms
            work[index] = 4 * math.sqrt(H) * single * rows[index].double().norm(dim=1) * largest
    in_fp32 = 32 * single * (peak + math.log(V))
    logps_bound = in_fp32.clone()
    if not from_logits:
        logps_bound += 2 * (half * peak + work) + half * logps.abs()
    logps_bound[labels < 0] = 0

    coef, loss, loss_bound, coef_bound = x.upstream.flatten().double(), None, 0.0, 0.0
    K, G = case.part.group_size, SEQUENCES // max(1, case.part.group_size)
    if K:
        sums = logps.view(x.labels.shape).sum(1).requires_grad_()
        out = reference.preference_loss(
            sums, x.rewards.double(), case.objective, ref_logps=torch.zeros_like(sums), group_size=K
        ).loss
        (slope,) = torch.autograd.grad(out, sums)
        coef = slope.repeat_interleave(case.length)
        loss = out.item()
        loss_bound = 2 * float((coef.abs() * logps_bound).sum()) + 64 * single * (1 + abs(loss))
        coef_bound = (
            case.beta**2 / (2 * G) * float(logps_bound.view(x.labels.shape).norm(dim=1).max())
        )

    def dlogits(index: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return dL/dlogits and its bounds, [rows, columns]."""
        if columns is None:
            z, columns = logits_of(index), torch.arange(V, device=labels.device)
        else:
            z = rows[index].double() @ weight[columns].t()
        p = (z - lse[index, None]).exp()
        hit = (labels[index, None] == columns).double()
        c = coef[index, None]
        error = (c.abs() * (2 * half + logps_bound[index, None]) + coef_bound) * (hit - p).abs()
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
    return Truth(
        logps.view(x.labels.shape), logps_bound.view(x.labels.shape), loss, loss_bound, gradients
    )
