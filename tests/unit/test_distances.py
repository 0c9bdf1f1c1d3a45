"""The table of distances: every cell is there, in both backends and in the reference."""

import math

import pytest
import torch

from rpo_kernels import RPOObjective, preference_loss, reference
from rpo_kernels.kernels import distances as triton_distances
from rpo_kernels.objectives import COMPARISONS, DISTANCES
from rpo_kernels.torch_backend import distances as torch_distances

from ..helpers import worst


def test_distances_have_their_functions_in_both_backends_and_unique_codes():
    cells = {
        f"{module.__name__}.{name}_{suffix}": hasattr(module, f"{name}_{suffix}")
        for name, rules in DISTANCES.items()
        for suffix in ("of_gap", *(("of_outcome", "pull") if rules.softmax else ()))
        for module in (triton_distances, torch_distances)
    }
    constants = {
        f"{triton_distances.__name__}.{name.upper()}": hasattr(triton_distances, name.upper())
        for name in DISTANCES
    }
    missing = [cell for cell, there in {**cells, **constants}.items() if not there]
    assert not missing
    assert sorted(rules.code for rules in DISTANCES.values()) == list(range(len(DISTANCES)))


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_distances_have_different_formulas_in_the_reference(comparison):
    """One that is missing would fall through to another's."""
    logps, rewards = torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor([1.0, 0.2, -0.3])
    values = {
        reference.preference_loss(
            logps,
            rewards.double(),
            RPOObjective(distance, 1.0, comparison=comparison, reference="none"),
            group_size=3,
        ).loss.item()
        for distance in DISTANCES
    }
    assert len(values) == len(DISTANCES)


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_of_gap_are_the_reference_and_slopes_their_derivatives(distance, backend):
    """Through pairs, from near the optimum, where textbook forms cancel, to hopeless ones."""
    gaps = torch.tensor([-40.0, -3.0, -1e-3, 0.0, 0.5, 20.0])
    d, tau = (x.flatten() for x in torch.meshgrid(gaps, gaps + 0.1, indexing="ij"))
    logps = torch.stack([d / 2, -d / 2], 1).flatten().requires_grad_()
    rewards = torch.stack([tau / 2, -tau / 2], 1).flatten()
    objective = RPOObjective(distance, 1.0, comparison="pairwise", reference="none")
    out = preference_loss(logps, rewards, objective, reduction="none", backend=backend)
    out.loss.sum().backward()
    exact = logps.detach().double().requires_grad_()
    truth = reference.preference_loss(exact, rewards.double(), objective, reduction="none").loss
    truth.sum().backward()
    # gaps of 60 are differences of fp32 numbers near 20 and 40
    assert worst(out.loss / (1 + truth), truth / (1 + truth)) < 2e-6
    assert worst(logps.grad, exact.grad) < 4e-6 * max(1.0, float(exact.grad.abs().max()))


def test_hellinger_is_half_way_between_the_divergences_and_bounded(backend):
    """The second order of all three is that of a chi-squared divergence; hard labels are finite."""
    logps, rewards = torch.tensor([0.3, -0.2]), torch.tensor([0.31, -0.21])
    small = {
        distance: float(
            preference_loss(
                logps, rewards, RPOObjective(distance, 1.0, reference="none"), backend=backend
            ).loss
        )
        for distance in ("backward_kl", "forward_kl", "hellinger")
    }
    mean = (small["backward_kl"] + small["forward_kl"]) / 2
    assert small["hellinger"] == pytest.approx(mean, rel=1e-3)
    objective = RPOObjective("hellinger", 1.0, reference="none")
    hopeless = torch.tensor([-80.0, 80.0], requires_grad=True)
    out = preference_loss(hopeless, torch.tensor([math.inf, 0.0]), objective, backend=backend)
    out.loss.backward()
    assert out.loss == 4
    assert -1e-30 < hopeless.grad[0] <= 0
    middle = torch.tensor([0.0, 0.0], requires_grad=True)
    out = preference_loss(middle, torch.tensor([math.inf, 0.0]), objective, backend=backend)
    out.loss.backward()
    # 4 (1 - sqrt(1/2)), and -2 sqrt(p) (1 - p) at p = 1/2
    assert out.loss.item() == pytest.approx(4 - 4 * 0.5**0.5, rel=1e-6)
    assert float(middle.grad[0]) == pytest.approx(-(0.5**0.5), rel=1e-6)
