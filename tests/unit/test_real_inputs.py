"""Accuracy on the hidden states of a real model: confident tokens, logits from -36 to 44, a
vocabulary of 49,152.

Needs two things that are not part of this project, and skips without them:

- ``smollm2_hidden.safetensors``, bf16 hidden states of SmolLM2-135M-Instruct on 24 preference
  pairs, in the folder RPO_KERNELS_DATA, or in ``../shared/data`` beside the repository;
- the model itself as ``model.safetensors``, in the folder RPO_KERNELS_SMOLLM2, or where the demo
  keeps it in ``.cache``.
"""

import itertools
import os
from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div

from rpo_kernels import (
    RPOObjective,
    linear_rpo_loss,
    linear_token_logps,
    reference,
    rpo_loss,
    token_logps,
)

from ..helpers import HAS_GPU, worst

ROOT = Path(__file__).parents[2]
HIDDEN = (
    Path(os.environ.get("RPO_KERNELS_DATA", ROOT.parent / "shared" / "data"))
    / "smollm2_hidden.safetensors"
)
MODEL = (
    Path(
        os.environ.get("RPO_KERNELS_SMOLLM2", ROOT / ".cache" / "smollm2" / "SmolLM2-135M-Instruct")
    )
    / "model.safetensors"
)
for path, what in [(HIDDEN, "RPO_KERNELS_DATA"), (MODEL, "RPO_KERNELS_SMOLLM2")]:
    if not path.exists():
        pytest.skip(
            f"real inputs are not here: {what} names no folder with {path.name}",
            allow_module_level=True,
        )
safetensors = pytest.importorskip("safetensors.torch")

BETA, ETA = 0.1, 0.5
OBJECTIVES = [
    RPOObjective(distance, BETA, ETA) for distance in ("squared", "backward_kl", "forward_kl")
]


@pytest.fixture(scope="module")
def real():
    """(hidden [N, 576] bf16, head [49152, 576] fp32, labels [N], boundaries of the 48 responses,
    rewards [48]).
    """
    with safetensors.safe_open(MODEL, "pt") as model:
        head = model.get_tensor("model.embed_tokens.weight").float()
    data = safetensors.load_file(HIDDEN)
    lengths = torch.unique_consecutive(data["seq_id"], return_counts=True)[1]
    return data["hidden"], head, data["targets"], [0, *lengths.cumsum(0).tolist()], data["rewards"]


def batch(real, pairs, device, longest=None):
    """(logits [N, V] fp32, labels [N], cu_seqlens, rewards) of some of the pairs, responses cut to
    the longest allowed.
    """
    hidden, head, labels, bounds, rewards = real
    responses = [i for pair in pairs for i in (2 * pair, 2 * pair + 1)]
    rows = [torch.arange(bounds[i], bounds[i + 1])[:longest] for i in responses]
    cu_seqlens = torch.tensor(
        [0, *itertools.accumulate(map(len, rows))], dtype=torch.int32, device=device
    )
    logits = hidden[torch.cat(rows)].to(device).float() @ head.to(device).t()
    return logits, labels[torch.cat(rows)].to(device), cu_seqlens, rewards[responses].to(device)


def pytorch_loss(logits, labels, cu_seqlens, rewards, ref, objective):
    """Sequence log-probabilities and summed loss of pairs as trainers write them."""
    token = logits.log_softmax(-1).gather(-1, labels.long()[:, None])[:, 0]
    logps = torch.stack([x.sum() for x in token.split(cu_seqlens.diff().tolist())])
    s, t = (objective.beta * (logps - ref)).view(-1, 2), (objective.eta * rewards).view(-1, 2)
    if objective.distance == "squared":
        return logps, 0.5 * ((s - t).diff(dim=1) ** 2).sum()
    p, q = s.log_softmax(1), t.log_softmax(1)
    direction = (p, q) if objective.distance == "backward_kl" else (q, p)
    return logps, kl_div(*direction, log_target=True, reduction="sum")


def errors(objective, logits, labels, cu_seqlens, rewards, backend):
    """Ours and PyTorch's: errors of log-probabilities, of the loss and, relative to its largest, of
    the gradient.
    """
    z, lengths = logits.double(), cu_seqlens.diff().long()
    logps64 = torch.stack(
        [x.sum() for x in reference.token_logps(z, labels).split(lengths.tolist())]
    ).requires_grad_()
    ref = (logps64.detach() + 3 * torch.randn(len(lengths)).to(z)).float()
    truth = reference.preference_loss(
        logps64, rewards.double(), objective, ref_logps=ref.double(), reduction="sum"
    ).loss
    (coef,) = torch.autograd.grad(truth, logps64)
    grad64 = torch.zeros_like(z).scatter_(1, labels.long()[:, None], 1).sub_(z.softmax(-1))
    grad64.mul_(coef.repeat_interleave(lengths)[:, None])
    x, y = logits.clone().requires_grad_(), logits.requires_grad_()
    out = rpo_loss(
        x,
        labels,
        rewards,
        objective,
        ref_logps=ref,
        cu_seqlens=cu_seqlens,
        reduction="sum",
        backend=backend,
    )
    theirs = pytorch_loss(y, labels, cu_seqlens, rewards, ref, objective)
    for logps, loss, leaf in [(out.logps, out.loss, x), (*theirs, y)]:
        (grad,) = torch.autograd.grad(loss, leaf)
        yield [
            worst(logps, logps64),
            worst(loss, truth),
            float((grad - grad64).abs().max() / grad64.abs().max()),
        ]


def test_rpo_loss_of_real_pairs_is_as_good_as_pytorch(real, backend, device):
    if (
        backend == "triton" and not HAS_GPU
    ):  # two pairs in one call, cut short: the interpreter is slow
        calls = [(objective, batch(real, [6, 10], device, longest=5)) for objective in OBJECTIVES]
    else:
        calls = (
            (objective, batch(real, [pair], device))
            for pair, objective in zip(range(24), itertools.cycle(OBJECTIVES))
        )
    ours, theirs = {}, {}
    for objective, inputs in calls:
        for kept, new in zip((ours, theirs), errors(objective, *inputs, backend)):
            kept[objective.distance] = list(map(max, kept.get(objective.distance, new), new))
    for distance in ours:
        for mine, other in zip(ours[distance], theirs[distance]):
            assert mine <= 1.5 * other, (distance, ours[distance], theirs[distance])
        # PyTorch's log_softmax is off by up to 1e-3 nats a sequence: that bounds little.
        nats, relative = 3e-5, 1e-4
        assert ours[distance][0] <= nats and ours[distance][2] <= relative, (
            distance,
            ours[distance],
        )


def test_token_logps_of_real_logits_keep_their_digits(real, backend, device):
    """Of tokens with p > 0.99 too, a tenth of these: log p = -1e-4 from logsumexps of 20 has four
    digits.
    """
    logits, labels, _, _ = batch(real, [10], device)
    truth = reference.token_logps(logits.double(), labels)
    ours = token_logps(logits, labels, backend=backend)
    assert float(((ours - truth) / truth).abs().max()) <= 2e-6


def test_linear_token_logps_of_bf16_inputs_are_within_a_thousandth_of_a_nat_per_sequence(
    real, device
):
    """Against a product in float64: what the fp32 logits of the linear path are for."""
    hidden, head, labels, bounds, _ = real
    rows = bounds[8]
    hidden, labels, head = (
        hidden[:rows].to(device),
        labels[:rows].to(device),
        head.to(device, torch.bfloat16),
    )
    truth = reference.token_logps(hidden.double() @ head.double().t(), labels)
    ours = linear_token_logps(hidden, head, labels)
    lengths = [b - a for a, b in itertools.pairwise(bounds[:9])]
    assert max(abs(float(error.sum())) for error in (ours.double() - truth).split(lengths)) <= 1e-3


def rounded(x):
    """To bf16, as float64."""
    return x.float().bfloat16().double()


@pytest.mark.parametrize("workspace", [None, 64 * 49152 * 6], ids=["P kept", "P of 64 rows"])
def test_linear_rpo_loss_gradients_of_bf16_inputs_are_as_exact_as_bf16_numbers(
    workspace, real, device
):
    """Against float64 throughout: no more than the roundings that the plan makes, of P and of the
    result for dhidden = c * U, and of c * h too for dweight = P^T (c * h). All in all less than
    2^-8, what one rounding may cost.
    """
    hidden, head, labels, bounds, rewards = real
    n, lengths = bounds[4], [b - a for a, b in itertools.pairwise(bounds[:5])]
    hidden, rewards = hidden[:n].to(device), rewards[:4].to(device)
    labels = labels[:n].to(device).long()
    cu_seqlens = torch.tensor(bounds[:5], dtype=torch.int32, device=device)
    head = head.to(device, torch.bfloat16)
    logits = hidden.double() @ head.double().t()
    logps = reference.token_logps(logits, labels)
    ref = (logps - 0.05 * torch.rand_like(logps)).float()
    sequences = torch.stack([x.sum() for x in logps.split(lengths)]).requires_grad_()
    ref_sequences = torch.stack([x.sum() for x in ref.double().split(lengths)])
    p = logits.softmax(-1).neg_()
    p.scatter_add_(1, labels[:, None], torch.ones_like(p[:, :1]))
    directions = p @ head.double()
    for objective in OBJECTIVES:
        truth = reference.preference_loss(
            sequences, rewards.double(), objective, ref_logps=ref_sequences
        ).loss
        (coef,) = torch.autograd.grad(truth, sequences)
        coef = torch.cat([c.expand(size) for c, size in zip(coef, lengths)])[:, None]
        exact = coef * directions, p.t() @ (coef * hidden.double())
        of_p = coef * (rounded(p) @ head.double()), rounded(p).t() @ (coef * hidden.double())
        scaled = p.t() @ rounded(coef * hidden.double())
        x, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        out = linear_rpo_loss(
            x,
            w,
            labels,
            rewards,
            objective,
            ref_logps=ref,
            cu_seqlens=cu_seqlens,
            workspace_bytes=workspace,
        )
        dhidden, dweight = torch.autograd.grad(out.loss, (x, w))
        for ours, truth, *roundings in [
            (dhidden, exact[0], of_p[0], rounded(exact[0])),
            (dweight, exact[1], of_p[1], rounded(exact[1]), scaled),
        ]:
            norm = truth.norm()
            expected = sum(float((x - truth).norm() / norm) ** 2 for x in roundings) ** 0.5
            assert float((ours.double() - truth).norm() / norm) <= min(1.05 * expected, 2**-8)
