"""Every preset is the published loss: each formula is written out here as its paper or its authors'
code has it.

Three implementations are held to it, value and gradient: the reference in float64, and the public
function with both of its backends in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rpo_kernels.objectives import DISTANCES, PRESETS, RPOObjective

from ..helpers import HAS_GPU

GROUPS = 6


class Batch(NamedTuple):
    """G groups of K responses, all [G, K]."""

    logps: Tensor
    ref_logps: Tensor
    rewards: Tensor
    lengths: Tensor


class Case(NamedTuple):
    objective: RPOObjective
    official: Callable[[Batch], Tensor]  # -> scalar, the mean over the batch
    K: int = 2
    rewards: tuple[float, ...] | None = None  # of every group, in place of random ones
    has_value: bool = True  # False: a policy-gradient surrogate, which only means its gradient


# ---- the published losses ------------------------------------------------------------------------
# Pairs hold the chosen response first. h is the log-ratio log pi(y) / pi_ref(y).


def pair_logits(b: Batch) -> Tensor:
    pi_logratios = b.logps[:, 0] - b.logps[:, 1]
    ref_logratios = b.ref_logps[:, 0] - b.ref_logps[:, 1]
    return pi_logratios - ref_logratios


def dpo(b, beta):  # arXiv 2305.18290, Eq. 7
    return -F.logsigmoid(beta * pair_logits(b)).mean()


def cdpo(b, beta, eps):  # "conservative DPO", the label smoothing of the DPO authors' code
    logits = pair_logits(b)
    return (-F.logsigmoid(beta * logits) * (1 - eps) - F.logsigmoid(-beta * logits) * eps).mean()


def robust_dpo(b, beta, eps):  # arXiv 2403.00409
    logits = pair_logits(b)
    return (
        (-F.logsigmoid(beta * logits) * (1 - eps) + F.logsigmoid(-beta * logits) * eps)
        / (1 - 2 * eps)
    ).mean()


def ipo(b, tau):  # arXiv 2310.12036, Eq. 17: log-probabilities are sums
    return ((pair_logits(b) - 1 / (2 * tau)) ** 2).mean()


def ipo_average(b, tau):  # TRL divides every log-probability by its response's length first
    return ipo(b._replace(logps=b.logps / b.lengths, ref_logps=b.ref_logps / b.lengths), tau)


def simpo(b, beta, gamma):  # arXiv 2405.14734, Eq. 6
    average = b.logps / b.lengths
    return -F.logsigmoid(beta * average[:, 0] - beta * average[:, 1] - gamma).mean()


def cpo(
    b, beta, alpha
):  # arXiv 2401.08417; TRL: preference loss + cpo_alpha x token-mean NLL of the chosen responses
    preference = -F.logsigmoid(beta * (b.logps[:, 0] - b.logps[:, 1])).mean()
    return preference + alpha * -b.logps[:, 0].sum() / b.lengths[:, 0].sum()


def distill_dpo(b, beta):  # arXiv 2405.19316
    return ((b.rewards[:, 0] - b.rewards[:, 1] - beta * pair_logits(b)) ** 2).mean()


def rebel(b, eta):  # arXiv 2404.16767, Algorithm 1
    return ((pair_logits(b) / eta - (b.rewards[:, 0] - b.rewards[:, 1])) ** 2).mean()


def exo(b, beta, eps):  # arXiv 2402.00856, Eq. 16: KL of (p, 1-p) from (1-eps, eps)
    logits = beta * pair_logits(b)
    return (
        logits.sigmoid() * (F.logsigmoid(logits) - math.log(1 - eps))
        + (-logits).sigmoid() * (F.logsigmoid(-logits) - math.log(eps))
    ).mean()


def softmax_dpo(b, beta):  # arXiv 2406.09215: one chosen response against K-1
    h = b.logps - b.ref_logps
    return -F.logsigmoid(-torch.logsumexp(beta * h[:, 1:] - beta * h[:, :1], dim=1)).mean()


def infonca(b, beta, alpha):  # arXiv 2402.05369
    s = beta * (b.logps - b.ref_logps)
    return -((b.rewards / alpha).softmax(1) * s.log_softmax(1)).sum(1).mean()


def nca(b, beta, alpha):  # arXiv 2402.05369
    s = beta * (b.logps - b.ref_logps)
    pull = -((b.rewards / alpha).softmax(1) * F.logsigmoid(s)).sum(1)
    return (pull - F.logsigmoid(-s).mean(1)).mean()


def nca_pair(b, beta):  # the same authors' code for preference pairs
    chosen, rejected = (beta * (b.logps - b.ref_logps)).unbind(1)
    return (
        -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    ).mean()


def rloo(
    b,
    beta,
    # arXiv 2402.14740: -(1/K) sum_i (R_i - mean_{j != i} R_j) log pi(y_i), the KL inside the reward
    # R
):
    total = b.rewards - beta * (b.logps - b.ref_logps).detach()
    K = total.shape[1]
    baseline = (total.sum(1, keepdim=True) - total) / (K - 1)
    return -((total - baseline) * b.logps).mean(1).mean()


def gvpo(
    b, beta
):  # arXiv 2504.19599: half a sum of squares, which the authors' code divides by K-1
    R_theta = beta * (b.logps - b.ref_logps)
    residual = (R_theta - R_theta.mean(1, keepdim=True)) - (
        b.rewards - b.rewards.mean(1, keepdim=True)
    )
    return (0.5 * residual**2).sum(1).mean() / (residual.shape[1] - 1)


def sppo(b, beta):  # arXiv 2405.00675, hard win rates 1 and 0
    h = b.logps - b.ref_logps
    return ((h[:, 0] - 0.5 / beta) ** 2 + (h[:, 1] + 0.5 / beta) ** 2).mean()


def bco(b, beta):  # arXiv 2404.04656, reward shift 0
    s = beta * (b.logps - b.ref_logps)
    return (-F.logsigmoid(s[:, 0]) - F.logsigmoid(-s[:, 1])).mean()


def nemo(b, beta, eta, form):  # the pairwise RPO losses of NeMo-Aligner
    delta = beta * pair_logits(b)
    target = eta * (b.rewards[:, 0] - b.rewards[:, 1])
    if form == "rpo_sq":
        return ((delta - target) ** 2).mean()
    policy, wanted = ((F.logsigmoid(x), F.logsigmoid(-x)) for x in (delta, target))
    p, q = (wanted, policy) if form == "rpo_bwd_kl" else (policy, wanted)
    return (p[0].exp() * (p[0] - q[0]) + p[1].exp() * (p[1] - q[1])).mean()


CASES = {
    "dpo": Case(RPOObjective.dpo(0.1), lambda b: dpo(b, 0.1)),
    "dpo, label smoothing": Case(RPOObjective.dpo(0.2, 0.1), lambda b: cdpo(b, 0.2, 0.1)),
    "dpo, hardly better than chance": Case(RPOObjective.dpo(0.2, 0.4), lambda b: cdpo(b, 0.2, 0.4)),
    "robust_dpo": Case(RPOObjective.robust_dpo(0.1, 0.1), lambda b: robust_dpo(b, 0.1, 0.1)),
    "ipo": Case(RPOObjective.ipo(0.1), lambda b: ipo(b, 0.1)),
    "ipo, average": Case(RPOObjective.ipo(0.3, average=True), lambda b: ipo_average(b, 0.3)),
    "simpo": Case(RPOObjective.simpo(2.0, 1.0), lambda b: simpo(b, 2.0, 1.0)),
    "cpo": Case(RPOObjective.cpo(0.1, 0.7), lambda b: cpo(b, 0.1, 0.7)),
    "distill_dpo": Case(RPOObjective.distill_dpo(0.1), lambda b: distill_dpo(b, 0.1)),
    "rebel": Case(RPOObjective.rebel(3.0), lambda b: rebel(b, 3.0)),
    "exo": Case(RPOObjective.exo(0.1, 1e-3), lambda b: exo(b, 0.1, 1e-3)),
    "softmax_dpo": Case(RPOObjective.softmax_dpo(0.1), lambda b: softmax_dpo(b, 0.1), K=4),
    "softmax_dpo, pairs": Case(RPOObjective.softmax_dpo(0.1), lambda b: dpo(b, 0.1)),
    "infonca": Case(RPOObjective.infonca(0.1, 0.5), lambda b: infonca(b, 0.1, 0.5), K=4),
    "infonca, hard": Case(
        RPOObjective.infonca(0.1), lambda b: dpo(b, 0.1), rewards=(math.inf, 0.0)
    ),
    "rloo": Case(RPOObjective.rloo(0.1), lambda b: rloo(b, 0.1), K=4, has_value=False),
    "gvpo": Case(RPOObjective.gvpo(0.1), lambda b: gvpo(b, 0.1), K=4),
    "sppo": Case(RPOObjective.sppo(1e-3), lambda b: sppo(b, 1e-3)),
    "nca": Case(RPOObjective.nca(0.1, 0.5), lambda b: nca(b, 0.1, 0.5), K=4),
    "nca, hard": Case(RPOObjective.nca(0.1), lambda b: nca_pair(b, 0.1), rewards=(1000.0, 0.0)),
    "bco": Case(RPOObjective.bco(0.1), lambda b: bco(b, 0.1)),
    "RPO, backward_kl": Case(
        RPOObjective("backward_kl", 0.1, 2.0), lambda b: nemo(b, 0.1, 2.0, "rpo_bwd_kl")
    ),
    "RPO, forward_kl": Case(
        RPOObjective("forward_kl", 0.1, 2.0), lambda b: nemo(b, 0.1, 2.0, "rpo_fwd_kl")
    ),
    "RPO, squared": Case(
        RPOObjective("squared", 0.1, 2.0, scale=2.0), lambda b: nemo(b, 0.1, 2.0, "rpo_sq")
    ),
}


# ---- the implementations -------------------------------------------------------------------------


@dataclass(frozen=True)
class Implementation:
    preference_loss: Callable[..., Any]
    dtype: torch.dtype
    options: dict[str, str]


@pytest.fixture(params=["reference", "torch", "triton"])
def implementation(request: pytest.FixtureRequest) -> Implementation:
    if request.param == "reference":
        from rpo_kernels.reference import preference_loss

        return Implementation(preference_loss, torch.float64, {})
    from rpo_kernels import preference_loss

    return Implementation(preference_loss, torch.float32, {"backend": request.param})


def make_batch(case: Case, seed: int = 0) -> Batch:
    """Float32 numbers, so that float64 can hold the same ones: no error here comes from rounding
    the input.
    """
    g = torch.Generator().manual_seed(seed)
    shape = (GROUPS, case.K)
    logps = -30 - 100 * torch.rand(shape, generator=g)
    ref_logps = logps + 8 * torch.randn(shape, generator=g)
    rewards = (
        torch.randn(shape, generator=g)
        if case.rewards is None
        else torch.tensor([case.rewards] * GROUPS)
    )
    return Batch(logps, ref_logps, rewards, torch.randint(5, 60, shape, generator=g))


def published(case: Case, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The published formula computed in ``dtype``: its value and its gradient [G, K], both as
    float64.
    """
    logps = batch.logps.to(dtype).requires_grad_()
    rest = {"ref_logps": batch.ref_logps.to(dtype), "rewards": batch.rewards.to(dtype)}
    loss = case.official(batch._replace(logps=logps, **rest))
    (grad,) = torch.autograd.grad(loss, logps)
    return loss.detach().double(), grad.double()


def ours(case: Case, batch: Batch, implementation: Implementation) -> tuple[Tensor, Tensor]:
    batch = Batch(*(x.to("cuda" if implementation.options and HAS_GPU else "cpu") for x in batch))
    logps = batch.logps.flatten().to(implementation.dtype).requires_grad_()
    out = implementation.preference_loss(
        logps,
        batch.rewards.flatten().to(implementation.dtype) if case.objective.uses_rewards else None,
        case.objective,
        ref_logps=None
        if case.objective.reference == "none"
        else batch.ref_logps.flatten().to(implementation.dtype),
        lengths=batch.lengths.flatten(),
        group_size=case.K,
        **implementation.options,
    )
    (grad,) = torch.autograd.grad(out.loss, logps)
    return out.loss.detach().double().cpu(), grad.view(GROUPS, case.K).double().cpu()


def assert_as_accurate(actual: Tensor, truth: Tensor, formula: Tensor, dtype: torch.dtype) -> None:
    """``actual`` may be 4 times as far from the float64 truth as the same formula is in float32,
    plus 8 ulps.

    Both evaluate a dozen operations of equal conditioning in another order, so each error is a draw
    of about the same
    size: the factor covers the luck of one draw, the ulps a draw of exactly 0. In float64 the
    allowance is 1e-10, far above its rounding and far below any wrong constant.
    """
    if dtype == torch.float64:
        torch.testing.assert_close(actual, truth, rtol=1e-10, atol=1e-13 * truth.abs().max().item())
        return
    error, formula_error = (actual - truth).abs().max().item(), (formula - truth).abs().max().item()
    allowed = 4 * formula_error + 8 * torch.finfo(dtype).eps * truth.abs().max().item()
    assert error <= allowed, (
        f"error {error:.2e}, the published formula in {dtype} has {formula_error:.2e}"
    )


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.has_value])
def test_presets_have_the_value_of_the_published_loss(implementation: Implementation, name: str):
    case = CASES[name]
    batch = make_batch(case)
    value, _ = ours(case, batch, implementation)
    truth, _ = published(case, batch, torch.float64)
    formula, _ = published(case, batch, torch.float32)
    assert_as_accurate(value, truth, formula, implementation.dtype)


@pytest.mark.parametrize("name", CASES)
def test_presets_have_the_gradient_of_the_published_loss(implementation: Implementation, name: str):
    case = CASES[name]
    batch = make_batch(case)
    _, grad = ours(case, batch, implementation)
    _, truth = published(case, batch, torch.float64)
    _, formula = published(case, batch, torch.float32)
    assert_as_accurate(grad, truth, formula, implementation.dtype)


def test_presets_are_all_in_this_file():
    presets = {
        name for name, member in vars(RPOObjective).items() if isinstance(member, classmethod)
    }
    assert presets == {name.partition(",")[0] for name in CASES} - {"RPO"}


def test_presets_are_all_on_the_page_of_objectives_and_so_are_the_distances():
    page = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
    assert len(PRESETS) == 15  # the README says fifteen
    assert [name for name in PRESETS if f"`{name}(" not in page] == []
    assert [name for name in DISTANCES if f"\n| `{name}`" not in page] == []
