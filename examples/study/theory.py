"""Theory, without a network: a policy that is a table of probabilities, compared with the optimum pi_ref exp(eta r / beta)."""

from __future__ import annotations

import torch

from rpo_kernels import RPOObjective, preference_loss

from . import language


def distance_to_optimum(distance: str, comparison: str = "listwise", eta: float = 1.0, strength: float = 4.0) -> float:
    """KL(policy || optimum) in nats, after the loss of the one group of all responses to a prompt was minimised over the table."""
    points = torch.tensor([language.judge(language.PROMPTS[0], words) for words in language.RESPONSES])
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(len(points), generator=generator).log_softmax(0)
    optimum = (reference.double() + strength * points.double()).log_softmax(0)
    objective = RPOObjective(distance, eta / strength, eta, comparison)
    table = reference.clone().requires_grad_()
    # log-probabilities need no normalising: but for pointwise comparisons, losses do not see a shift of all of them
    optimizer = torch.optim.Adam([table], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for _ in range(1000):
        logps = table.log_softmax(0)
        preference_loss(logps, points, objective, ref_logps=reference, group_size=len(points)).loss.backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    logps = table.detach().double().log_softmax(0)
    return (logps.exp() * (logps - optimum)).sum().item()
