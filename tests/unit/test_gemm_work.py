"""The linear functions' GEMMs, as PyTorch's profiler counts their multiply-adds: 3 with a trainable
head and 2 with a frozen one, for any loss, and the logits of rows whose P was dropped once more.

A dispatch mode would see nothing inside custom operators.
"""

import re
from pathlib import Path

import pytest
import torch
from torch.autograd.profiler import profile
from torch.nn.functional import logsigmoid, sigmoid

from rpo_kernels import (
    RPOObjective,
    linear_rpo_loss,
    linear_token_logps,
    linear_token_logps_and_entropy,
    preference_loss,
    sequence_logps,
)

from ..helpers import HAS_GPU

pytestmark = pytest.mark.skipif(HAS_GPU, reason="chunks and workspaces here are those of a CPU")
N, H, V, CHUNK = 1024, 16, 128, 256
OBJECTIVE = RPOObjective("backward_kl", 0.1)


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    monkeypatch.setattr("rpo_kernels.ops.head.CPU_CHUNK_ROWS", CHUNK)


def gemms(run) -> float:
    """Multiply-adds of run(), in GEMMs of the scored rows with the head."""
    with profile(use_kineto=False, with_flops=True) as profiler:
        run()
    flops = [x.flops for x in profiler.key_averages() if x.key in ("aten::mm", "aten::addmm")]
    assert flops and all(flops)
    return sum(flops) / (2 * N * H * V)


def rpo(hidden, weight, labels, rewards, workspace, reduction="mean"):
    out = linear_rpo_loss(
        hidden,
        weight,
        labels,
        rewards,
        OBJECTIVE,
        ref_logps=torch.zeros(len(labels)),
        group_size=len(labels),
        reduction=reduction,
        workspace_bytes=workspace,
        backend="torch",
    )
    return out.loss.sum()


def one_loss_per_group(*batch):
    return rpo(*batch, reduction="none")


def kto(hidden, weight, labels, rewards, workspace):
    """Kahneman-Tversky optimisation, written by hand: every other response is a bad one."""
    tokens = linear_token_logps(hidden, weight, labels, workspace_bytes=workspace, backend="torch")
    gains = 0.1 * sequence_logps(tokens)
    return sigmoid(torch.where(torch.arange(len(gains)) % 2 == 0, -gains, gains)).mean()


def sum_of_objectives(hidden, weight, labels, rewards, workspace):
    tokens = linear_token_logps(hidden, weight, labels, workspace_bytes=workspace, backend="torch")
    logps = sequence_logps(tokens)
    rpo = preference_loss(logps, rewards, OBJECTIVE, ref_logps=torch.zeros_like(logps)).loss
    return rpo - 0.2 * logsigmoid(logps[0] - logps[1]) - tokens[0].mean()


def reported_entropies(hidden, weight, labels, rewards, workspace, entropy_grad=False):
    tokens, entropies = linear_token_logps_and_entropy(
        hidden,
        weight,
        labels,
        workspace_bytes=workspace,
        entropy_grad=entropy_grad,
        backend="torch",
    )
    assert float(entropies.detach().mean()) > 0
    return kto_of(tokens)


def undecided_entropies(*batch):
    return reported_entropies(*batch, entropy_grad=None)


def kto_of(tokens):
    return sigmoid(sequence_logps(tokens)).mean()


def batch_of(K, dtype=torch.float32):
    """K responses of one group, with N scored tokens in all and as many prompt tokens."""
    labels = torch.randint(V, (K, 2 * N // K))
    labels[:, : N // K] = -100
    hidden = torch.randn(*labels.shape, H).to(dtype).requires_grad_()
    return hidden, torch.randn(V, H).to(dtype), labels, torch.randn(K)


LOSSES = [
    *((loss, K) for loss in (rpo, one_loss_per_group) for K in (2, 8)),
    *((loss, 2) for loss in (kto, sum_of_objectives, reported_entropies, undecided_entropies)),
]


@pytest.mark.parametrize("times", [0.5, 1, 2, 4], ids=lambda x: f"{x} x workspace")
@pytest.mark.parametrize(("loss", "K"), LOSSES)
def test_linear_functions_cost_two_gemms_under_a_frozen_head(loss, times, K):
    hidden, weight, labels, rewards = batch_of(K)
    workspace = int(N / times) * 4 * V  # fp32 logits and P share their rows
    total = gemms(lambda: loss(hidden, weight, labels, rewards, workspace).backward())
    assert total == 2


@pytest.mark.parametrize("times", [0.5, 1, 2, 4], ids=lambda x: f"{x} x workspace")
@pytest.mark.parametrize(("loss", "K"), LOSSES)
def test_linear_functions_cost_three_gemms_and_the_share_of_rows_beyond_the_workspace(
    loss, times, K
):
    """What is settled in a backward keeps P beside a chunk of the logits that come once more."""
    hidden, weight, labels, rewards = batch_of(K)
    rows = int(N / times)
    room = rows if loss is rpo or rows >= N else rows - CHUNK
    dropped = max(N - room, 0) / N
    total = gemms(
        lambda: loss(hidden, weight.requires_grad_(), labels, rewards, rows * 4 * V).backward()
    )
    assert total == 3 + dropped


@pytest.mark.parametrize("loss", [rpo, kto])
def test_linear_functions_keep_p_of_bf16_in_the_room_of_the_fp32_sum_it_spares(loss):
    """Of 2,048 rows as here 16-bit P is 2 V bytes, a sum of dweight 4 V H in all."""
    hidden, weight, labels, rewards = batch_of(2, torch.bfloat16)
    rows = N - 2 * H  # 4 H bytes of a column are 2 H rows of P
    workspace = rows * 2 * V + CHUNK * 4 * V
    total = gemms(
        lambda: loss(hidden, weight.requires_grad_(), labels, rewards, workspace).backward()
    )
    assert total == 3


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("entropy_grad", "expected"), [(True, 4), (None, 5)])
def test_linear_token_logps_and_entropy_computes_logits_again_for_gradients_of_entropies(
    entropy_grad, expected, frozen
):
    hidden, weight, labels, _ = batch_of(2)
    weight.requires_grad_(not frozen)

    def run():
        logps, entropies = linear_token_logps_and_entropy(
            hidden, weight, labels, entropy_grad=entropy_grad, backend="torch"
        )
        (logps.sum() + 0.1 * entropies.sum()).backward()

    assert gemms(run) == expected - frozen


@pytest.mark.parametrize("is_trainable", [True, False])
@pytest.mark.parametrize("is_differentiated", [False, True])
@pytest.mark.parametrize("entropy_grad", [None, False, True])
def test_entropy_grad_costs_the_gemms_that_the_options_page_says(
    entropy_grad, is_differentiated, is_trainable
):
    page = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
    (row,) = re.findall(rf"^\| {entropy_grad}\b.*\|$", page, re.MULTILINE)
    printed = re.findall(r"\d", row.split("|")[2 + is_differentiated])
    hidden, weight, labels, _ = batch_of(2)
    weight.requires_grad_(is_trainable)

    def step():
        logps, entropies = linear_token_logps_and_entropy(
            hidden, weight, labels, entropy_grad=entropy_grad, backend="torch"
        )
        if is_differentiated:
            assert entropies.requires_grad == bool(printed)
        (logps.sum() + (entropies.sum() if is_differentiated else 0)).backward()

    total = gemms(step)
    if printed:  # (with a trainable head, with a frozen one)
        assert total == int(printed[not is_trainable])
