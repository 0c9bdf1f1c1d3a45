"""Theory, without a network: a table of probabilities as the policy, and its optimum."""

from __future__ import annotations

import torch

from rpo_kernels import RPOObjective, preference_loss

from . import language

STEPS = 400


def distance_to_optimum(
    distance: str, comparison: str = "listwise", eta: float = 1.0, normalized: bool = False
) -> float:
    """KL(policy || optimum) in nats; the optimum is pi_ref exp(eta r / beta) / Z, eta / beta = 4.

    The loss is that of one group of all responses of up to 2 words. `normalized` subtracts (beta /
    eta) log Z from the rewards.
    """
    strength = 4.0
    words = [words for words in language.RESPONSES if len(words) <= 2]
    points = torch.tensor([language.judge(language.PROMPTS[0], said) for said in words])
    reference = torch.randn(len(points), generator=torch.Generator().manual_seed(0)).log_softmax(0)
    optimum = (reference.double() + strength * points.double()).log_softmax(0)
    mean = (reference.exp() * points).sum()
    points = points - (
        (reference + strength * points).logsumexp(0) / strength if normalized else mean
    )
    objective = RPOObjective(distance, eta / strength, eta, comparison)
    table = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        logps = table.log_softmax(0)
        preference_loss(
            logps, points, objective, ref_logps=reference, group_size=len(points)
        ).loss.backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    logps = table.detach().double().log_softmax(0)
    return (logps.exp() * (logps - optimum)).sum().item()
