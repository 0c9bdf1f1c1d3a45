"""`on_logits` sees every scored row of logits once, in order, at no further GEMM."""

from __future__ import annotations

import pytest
import torch

from rpo_kernels import RPOObjective, linear_rpo_loss, linear_token_logps, token_logps

from ..helpers import worst

S, T, H, V = 4, 6, 8, 33
OPTIONS = {
    "temperature": 0.7,
    "logit_scale": 1.3,
    "softcap": 4.0,
    "workspace_bytes": 5 * 4 * V,
}  # chunks of 5 rows


@pytest.fixture
def batch():
    hidden, weight, bias = torch.randn(S, T, H), torch.randn(V, H), torch.randn(V)
    labels = torch.randint(V, (S, T))
    labels[torch.rand(S, T) < 0.3] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels, bias


class Watcher(list):
    def __call__(self, logits, labels, transform):
        self.append((logits.clone(), labels, token_logps(logits, labels, **transform)))


def check(seen, hidden, weight, labels, bias) -> None:
    scored = labels != -100
    expected = (hidden @ weight.T + bias)[scored].detach()
    logits, y, logps = (torch.cat(parts) for parts in zip(*seen))
    assert torch.equal(y, labels[scored])
    assert worst(logits, expected) < 1e-5
    truth = token_logps(expected, y, **{k: x for k, x in OPTIONS.items() if k != "workspace_bytes"})
    assert worst(logps, truth) < 1e-5


def test_on_logits_sees_the_logits_of_token_logps(batch):
    hidden, weight, labels, bias = batch
    seen = Watcher()
    logps = linear_token_logps(hidden, weight, labels, bias=bias, on_logits=seen, **OPTIONS)
    assert len(seen) > 2
    logps.sum().backward()  # computes the logits a second time, and shows nothing
    check(seen, hidden, weight, labels, bias)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_on_logits_sees_the_policys_logits_and_not_the_references(batch, reduction):
    hidden, weight, labels, bias = batch
    seen = Watcher()
    out = linear_rpo_loss(
        hidden,
        weight,
        labels,
        torch.rand(S),
        RPOObjective(),
        bias=bias,
        ref_hidden=torch.randn(S, T, H),
        reduction=reduction,
        on_logits=seen,
        **OPTIONS,
    )
    out.loss.sum().backward()
    check(seen, hidden, weight, labels, bias)


def test_on_logits_does_not_see_the_calls_that_it_makes_itself(batch):
    hidden, weight, labels, bias = batch
    seen = []

    def look(logits, *_):
        seen.append(len(logits))
        linear_token_logps(hidden.detach(), weight.detach(), labels)

    linear_token_logps(hidden, weight, labels, on_logits=look)
    assert sum(seen) == (labels != -100).sum()


def test_on_logits_must_be_callable(batch):
    hidden, weight, labels, bias = batch
    with pytest.raises(
        TypeError, match=r"linear_token_logps: `on_logits` must be a function .*, got 3"
    ):
        linear_token_logps(hidden, weight, labels, on_logits=3)
