"""Batches, heads and the parts of them that a rank holds, for the tests of several ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rpo_kernels import (
    RPOObjective,
)

V = 13
# Columns per rank: uneven; on four ranks one of them has a single column, one none (as the last
# shard of a small DTensor).
SPLITS = {2: (5, 8), 4: (1, 8, 4, 0)}
INF = float("inf")


def columns(group) -> slice:
    split = SPLITS[group.size()]
    first = sum(split[: group.rank()])
    return slice(first, first + split[group.rank()])


def close(ours: Tensor, truth: Tensor, bound: float = 1e-6) -> None:
    """Within 1e-6, relative to the largest entry where that exceeds 1."""
    torch.testing.assert_close(
        ours,
        truth,
        rtol=0,
        atol=bound * max(1.0, float(truth.abs().max()) if truth.numel() else 0.0),
    )


def same_on_all_ranks(x: Tensor, group) -> None:
    everyone = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(everyone, x.detach().contiguous(), group=group)
    assert all(torch.equal(x, other) for other in everyone)


def raises(error: type[Exception], text: str, call, *args, **kwargs) -> None:
    with pytest.raises(error) as raised:
        call(*args, **kwargs)
    assert text in str(raised.value), str(raised.value)


def batch(packed=False, ragged=False):
    """logits [S, T, V] or [N, V], labels, rewards, and what says how sequences and groups lie."""
    S, T = 6, 5
    logits, labels = torch.randn(S, T, V) * 3, torch.randint(0, V, (S, T))
    labels[0, 1:3] = labels[3] = -100  # a sequence without scored tokens
    logits[1, 0, labels[1, 0]] += 40  # a confident token
    layout = {"ref_logps": torch.randn(S)}
    if packed:
        logits, labels = logits.flatten(0, 1), labels.flatten()
        layout["cu_seqlens"] = torch.tensor([0, 7, 7, 12, 17, 25, 30], dtype=torch.int32)
    if ragged:
        layout["cu_groups"] = torch.tensor([0, 1, 4, 6], dtype=torch.int32)
    return logits, labels, torch.randn(S), layout


H, RANK = 6, 2


def head(tokens: tuple[int, ...]) -> dict[str, Tensor]:
    """The leaves of a whole head.

    Logits are small: their rounding, times their size, is the error of p in one process too.
    """
    return {
        "hidden": torch.randn(*tokens, H),
        "weight": torch.randn(V, H) / 3,
        "bias": torch.randn(V),
        "lora_hidden": torch.randn(*tokens, RANK),
        "lora_weight": torch.randn(V, RANK),
    }


def of_this_rank(leaves: dict[str, Tensor], group, frozen: bool = False) -> dict[str, Tensor]:
    trained = ("hidden", "lora_hidden") if frozen else leaves
    return {
        name: (x if "hidden" in name else x[columns(group)]).clone().requires_grad_(name in trained)
        for name, x in leaves.items()
    }


def same_gradients(ours: dict[str, Tensor], truth: dict[str, Tensor], group) -> None:
    for name, x in ours.items():
        if x.requires_grad:
            close(
                x.grad, truth[name].grad if "hidden" in name else truth[name].grad[columns(group)]
            )
        else:
            assert x.grad is None


ROW = V * 4
# Bytes of one row (every group in two sweeps), of a group or two, and of everything.
WORKSPACES = (ROW, 12 * ROW, None)

OBJECTIVES = [
    RPOObjective(
        distance, 0.3, comparison=comparison, average=distance == "squared", sft_weight=0.1
    )
    for distance, comparison in itertools.product(
        ("squared", "backward_kl", "forward_kl"), ("listwise", "pairwise", "pointwise")
    )
]
