"""docs/objectives.md: printed settings train in every dtype as they do in float64."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from rpo_kernels import linear_rpo_loss, preference_loss, reference

from ..helpers import kernel_dtypes, worst

PAGE = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
SETTINGS: dict = {"__name__": "page"}
for source in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
    exec(compile(source, "docs/objectives.md", "exec"), SETTINGS)

S, T, H, V = 8, 6, 32, 101
SCALE = 65536.0  # where torch.amp.GradScaler begins


def errors(objective, dtype, group_size, upstream, backend, device) -> tuple[float, list[float]]:
    """Of the loss, and of both gradients relative to their largest element, against float64."""
    hidden = torch.randn(S, T, H, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, device=device) * H**-0.5).to(dtype).requires_grad_()
    labels = torch.randint(V, (S, T), device=device)
    labels[:, :2] = -100
    rewards = torch.randn(S, device=device)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    tokens = reference.linear_token_logps(exact[0].detach() * 0.9, exact[1].detach(), labels)
    ref_logps = reference.sequence_logps(tokens, labels).float()
    groups = {"ref_logps": ref_logps, "group_size": group_size}
    truth = reference.linear_rpo_loss(*exact, labels, rewards.double(), objective, **groups)
    truth.loss.backward()
    out = linear_rpo_loss(hidden, weight, labels, rewards, objective, backend=backend, **groups)
    (out.loss * upstream).backward()
    gradients = [
        worst(ours.grad.double() / upstream, theirs.grad) / float(theirs.grad.abs().max())
        for ours, theirs in zip((hidden, weight), exact)
    ]
    return worst(out.loss, truth.loss), gradients


@pytest.mark.parametrize("group_size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["online", "offline"])
def test_linear_rpo_loss_of_printed_settings(name, dtype, group_size, backend, device):
    """Two roundings to the dtype, and fp32 sums of a hundred products."""
    if dtype not in kernel_dtypes(backend):
        pytest.skip("Triton's interpreter truncates to bf16")
    upstream = SCALE if dtype == torch.float16 else 1.0
    loss, gradients = errors(SETTINGS[name], dtype, group_size, upstream, backend, device)
    tolerance = torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    assert loss <= 16 * torch.finfo(torch.float32).eps and max(gradients) <= tolerance


def test_linear_rpo_loss_of_the_online_setting_needs_a_scaled_loss_in_fp16(backend, device):
    _, gradients = errors(SETTINGS["online"], torch.float16, 2, 1.0, backend, device)
    assert max(gradients) > 4 * torch.finfo(torch.float16).eps


def test_preference_loss_of_the_online_setting_is_a_policy_gradient_with_fixed_weights(device):
    objective, K = SETTINGS["online"], 4
    logps = (100 * torch.rand(3 * K, device=device) - 200).requires_grad_()
    rewards, ref_logps = torch.randn(3 * K, device=device), torch.full_like(logps, -150.0)
    preference_loss(
        logps, rewards, objective, ref_logps=ref_logps.detach(), group_size=K
    ).loss.backward()
    weights = 1 / K - (objective.eta * rewards).view(-1, K).softmax(1)
    expected = objective.beta * weights.flatten() / 3
    largest = objective.beta * 50  # implicit reward: softmax(s) is within that of 1 / K
    assert worst(logps.grad, expected) <= objective.beta / 3 * largest


def test_preference_loss_of_the_printed_mpo_is_its_formula(device):
    logps, ref_logps = -20 * torch.rand(2, 8, dtype=torch.float64, device=device)
    lengths = torch.randint(1, 9, (8,), device=device)
    out = preference_loss(
        logps.float(), None, SETTINGS["mpo"], ref_logps=ref_logps.float(), lengths=lengths
    )
    chosen, rejected = (0.1 * (logps - ref_logps)).view(4, 2).unbind(1)
    losses = (
        -0.8 * logsigmoid(chosen - rejected)
        - 0.2 * (logsigmoid(chosen) + logsigmoid(-rejected))
        - logps[::2] / lengths[::2]
    )
    assert worst(out.loss, losses.mean()) < 1e-6
    assert {"dpo/loss", "bco/rewards/margins", "rewards/margins"} <= out.metrics().keys()
