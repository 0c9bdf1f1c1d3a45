"""The result of the loss functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import groups_of


class RPOOutput(NamedTuple):
    """A preference loss and the quantities it was computed from; only `loss` has a gradient.

    Attributes:
        loss: scalar, or `[G]` with `reduction="none"`.
        losses: `[G]`, loss of each group; 0 for a group with nothing to compare.
        rewards: `[S]`, implicit rewards a_i (l_i - lref_i) in reward units, without margin; 0 for a
            response without scored tokens.
        logps: `[S]`, log-probabilities of the sequences (sums over tokens, in nats).
        lengths: `[S]` int, numbers of scored tokens; None if the caller gave none.
        targets: `[S]`, target rewards t_i; NaN for labels beyond 1, which no target has (robust
            DPO).
        cu_groups: `[G+1]` int32 for ragged groups, None for groups of one size.
        parts: for a sum of objectives, the output of each part by name, whose losses add up to this
            one's (rewards and targets above are those of the first part); None otherwise.
        aux_loss: what an attached model of transformers added to `loss`: the auxiliary loss of a
            mixture of experts times its coefficient; None elsewhere.
    """

    loss: Tensor
    losses: Tensor
    rewards: Tensor
    logps: Tensor
    lengths: Tensor | None
    targets: Tensor
    cu_groups: Tensor | None = None
    parts: dict[str, RPOOutput] | None = None
    aux_loss: Tensor | None = None

    @property
    def implicit_rewards(self) -> Tensor:
        """Alias of `rewards`, to distinguish them from the explicit rewards passed to a loss."""
        return self.rewards

    def metrics(self) -> dict[str, Tensor]:
        """Compute scalar metrics, on the device and without synchronisation.

        Pairs have TRL's names: `rewards/chosen`, `rewards/rejected`, `rewards/accuracies` (share of
        pairs with s_chosen > s_rejected), `rewards/margins`, `logps/chosen`, `logps/rejected`. The
        chosen response is the one with the larger target, or the first of two equal ones.

        Other groups have `rewards/mean`, `rewards/agreement` (share of response pairs with
        different targets that the implicit rewards order alike), `rewards/spread` (standard
        deviation of the implicit rewards within a group, averaged over groups) and `logps/mean`.

        Responses without scored tokens do not count, nor do pairs that contain one; a mean over
        nothing is NaN.

        A sum of objectives has the metrics of its first part, then `NAME/loss` and
        `NAME/rewards/...` of each part.
        """
        metrics = self._metrics()
        for name, part in (self.parts or {}).items():
            metrics[f"{name}/loss"] = part.losses.mean() if part.loss.dim() else part.loss
            metrics |= {
                f"{name}/{key}": x
                for key, x in part._metrics().items()
                if key.startswith("rewards/")
            }
        return metrics

    def _metrics(self) -> dict[str, Tensor]:
        S, G = self.rewards.shape[0], self.losses.shape[0]
        present = (
            torch.ones_like(self.rewards, dtype=torch.bool)
            if self.lengths is None
            else self.lengths > 0
        )
        if self.cu_groups is None and S == 2 * G:
            return self._pair_metrics(present.view(G, 2).all(1))
        group = groups_of(S, max(S // max(G, 1), 1), self.cu_groups, self.rewards.device)
        s = torch.where(present, self.rewards, 0)
        count = _by_group(present.float(), group, G)
        mean = _by_group(s, group, G) / count
        deviation = torch.where(present, s - mean[group], 0) ** 2
        spread = (_by_group(deviation, group, G) / (count - 1)).sqrt()
        together = (group[:, None] == group) & present[:, None] & present
        ordered = together & (self.targets[:, None] > self.targets)
        agree = ordered & (self.rewards[:, None] > self.rewards)
        return {
            "rewards/mean": s.sum() / present.sum(),
            "rewards/agreement": agree.sum().float() / ordered.sum(),
            "rewards/spread": _mean(spread, count > 1),
            "logps/mean": torch.where(present, self.logps, 0).sum() / present.sum(),
        }

    def _pair_metrics(self, counted: Tensor) -> dict[str, Tensor]:
        chosen = self.targets.view(-1, 2).argmax(1, keepdim=True)
        metrics = {}
        for name, x in (("rewards", self.rewards), ("logps", self.logps)):
            x = x.view(-1, 2)
            metrics[f"{name}/chosen"] = x.gather(1, chosen)[:, 0]
            metrics[f"{name}/rejected"] = x.gather(1, 1 - chosen)[:, 0]
        margins = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        metrics["rewards/accuracies"] = (margins > 0).float()
        metrics["rewards/margins"] = margins
        return {name: _mean(x, counted) for name, x in metrics.items()}


def _by_group(x: Tensor, group: Tensor, G: int) -> Tensor:
    """Sum over groups in a fixed order, which index_add on a GPU does not have."""
    member = group == torch.arange(G, device=group.device)[:, None]
    return torch.where(member, x, 0).sum(1)


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0).sum() / mask.sum()
