"""Theory, without a network: a policy that is a table of probabilities, against the optimum pi_ref exp(eta r / beta)."""

from __future__ import annotations

import torch

from rpo_kernels import RPOObjective, preference_loss

from . import language


def distance_to_optimum(
    distance: str, comparison: str = "listwise", eta: float = 1.0, *, normalized: bool = False
) -> float:
    """KL(policy || optimum) in nats, after 400 steps on the loss of one group: all responses of up to 2 words, at eta / beta = 4.

    ``normalized`` takes (beta / eta) log Z off the rewards, Z = sum_y pi_ref(y) exp(eta r(y) / beta).
    """
    strength, steps = 4.0, 400
    words = [words for words in language.RESPONSES if len(words) <= 2]
    points = torch.tensor([language.judge(language.PROMPTS[0], said) for said in words])
    reference = torch.randn(len(points), generator=torch.Generator().manual_seed(0)).log_softmax(0)
    optimum = (reference.double() + strength * points.double()).log_softmax(0)
    mean = (reference.exp() * points).sum()
    points = points - ((reference + strength * points).logsumexp(0) / strength if normalized else mean)
    objective = RPOObjective(distance, eta / strength, eta, comparison)
    table = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        logps = table.log_softmax(0)
        preference_loss(logps, points, objective, ref_logps=reference, group_size=len(points)).loss.backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    logps = table.detach().double().log_softmax(0)
    return (logps.exp() * (logps - optimum)).sum().item()
