"""Providers: rpo_kernels, naive PyTorch, and each library that computes the same numbers.

A provider computes token log-probabilities `[S, T]` (0 where the label is -100) from logits, or
from hidden states and an lm_head, and a loss from these. Each calls its package as that package's
own trainers and examples do, with default settings.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from typing import ClassVar

import torch
import torch.nn.functional as F
from cases import Case, Inputs
from torch import Tensor

import rpo_kernels


class Provider:
    """A way to compute the loss head.

    `from_logits` and `from_hidden` are None if it has none.
    """

    name: str
    package = "torch"  # its version is reported
    triton = False  # whether its only backend is Triton on a GPU
    overwrites = False  # whether the backward overwrites the logits

    def from_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def from_hidden(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def loss(self, case: Case, x: Inputs) -> Tensor:
        """Return DPO of pairs, or listwise RPO (backward KL) of larger groups.

        Reference log-probabilities are 0.
        """
        s = case.beta * self.from_hidden(x.hidden, x.weight, x.labels).sum(1).view(
            -1, case.part.group_size
        )
        if case.part.group_size == 2:
            return -F.logsigmoid(s[:, 0] - s[:, 1]).mean()
        target = x.rewards.view(s.shape).log_softmax(1)
        return F.kl_div(s.log_softmax(1), target, log_target=True, reduction="batchmean")

    def order(self, sequences: int) -> list[int]:
        """Return the order of sequences that it needs.

        The inputs are [chosen, rejected, chosen, rejected, ...].
        """
        return list(range(sequences))

    def missing(self, case: Case, device: str) -> str | None:
        """Return why it cannot run a case here, or None."""
        if importlib.util.find_spec(self.package.replace("-", "_")) is None:
            return f"{self.package} is not installed"
        if (self.from_logits if case.part.start == "logits" else self.from_hidden) is None:
            return (
                f"starts from {'hidden states' if case.part.start == 'logits' else 'logits'} only"
            )
        if self.triton and device != "cuda":
            return "runs on a GPU only"
        return None

    @property
    def version(self) -> str:
        if self.package == "rpo_kernels":
            return rpo_kernels.__version__
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return ""


class Naive(Provider):
    """fp32 log_softmax and gather of every row, as trainers without a fused head do."""

    name = "naive PyTorch"

    def from_logits(self, logits, labels):
        logps = torch.log_softmax(logits.float(), -1).gather(-1, labels.clamp(min=0)[..., None])[
            ..., 0
        ]
        return torch.where(labels != -100, logps, 0)

    def from_hidden(self, hidden, weight, labels):
        return self.from_logits(F.linear(hidden, weight), labels)


class Compiled(Naive):
    """The same under torch.compile, compiled for each shape."""

    name = "torch.compile"

    @functools.cached_property
    def from_logits(self):
        return torch.compile(Naive().from_logits, dynamic=False)

    @functools.cached_property
    def from_hidden(self):
        return torch.compile(Naive().from_hidden, dynamic=False)


class TorchLinear(Provider):
    """`torch.nn.functional.linear_cross_entropy` with its chunked options, since PyTorch 2.13."""

    name = "F.linear_cross_entropy"
    from_logits = None

    def missing(self, case, device):
        if not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} has no linear_cross_entropy (2.13 has)"
        return super().missing(case, device)

    def from_hidden(self, hidden, weight, labels):
        options = torch.nn.LinearCrossEntropyOptions()
        losses = F.linear_cross_entropy(
            hidden.flatten(0, -2), weight, labels.flatten(), reduction="none", options=options
        )
        return -losses.float().view(labels.shape)


class TRL(Provider):
    """`trl.kernels` as called by `add_fused_lm_head`: scored rows, in chunks of 32,768 columns."""

    name, package = "TRL", "trl"
    columns = 32_768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE

    def missing(self, case, device):
        reason = super().missing(case, device)
        if reason is None and case.part.start == "logits" and device != "cuda":
            return "its kernel from logits runs on a GPU only"
        if reason is None and case.part.trains and importlib.util.find_spec("datasets") is None:
            return "its backward imports trl.trainer, which needs the package datasets"
        return reason

    def from_logits(self, logits, labels):
        from trl.kernels import selective_log_softmax_and_entropy

        return selective_log_softmax_and_entropy(logits, labels, row_mask=labels != -100)[0]

    def from_hidden(self, hidden, weight, labels):
        from trl.kernels import ChunkedLogProbFunction

        scored = labels != -100
        logps, *_ = ChunkedLogProbFunction.apply(
            hidden[scored], weight, None, labels[scored], 1.0, self.columns, None, 1.0, ()
        )
        return logps.new_zeros(labels.shape).masked_scatter(scored, logps)


class Liger(Provider):
    """`LigerFusedLinearDPOLoss`: DPO of pairs, without log-probabilities.

    All chosen responses come before all rejected ones.
    """

    name, package = "Liger", "liger-kernel"
    from_logits = None

    def missing(self, case, device):
        if case.part.group_size != 2:
            return "has a loss of pairs only"
        return super().missing(case, device)

    def order(self, sequences):
        return [*range(0, sequences, 2), *range(1, sequences, 2)]

    def loss(self, case, x):
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        loss, *_ = LigerFusedLinearDPOLoss(beta=case.beta, use_ref_model=False)(
            x.weight, x.hidden, x.labels
        )
        return loss


class CutCrossEntropy(Provider):
    """Apple's `linear_cross_entropy` with its default gradient filter."""

    name, package, triton = "cut-cross-entropy", "cut-cross-entropy", True
    from_logits = None

    def from_hidden(self, hidden, weight, labels):
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(hidden, weight, labels, reduction="none").float()


class Ours(Provider):
    """This library with default settings: fp32 logits on the linear path."""

    name, package = "rpo_kernels", "rpo_kernels"
    options: ClassVar = {}

    def from_logits(self, logits, labels):
        return rpo_kernels.token_logps(logits, labels, **self.options)

    def from_hidden(self, hidden, weight, labels):
        return rpo_kernels.linear_token_logps(hidden, weight, labels, **self.options)

    def loss(self, case, x):
        reference = x.rewards.new_zeros(x.rewards.shape)
        rewards = x.rewards if case.objective.uses_rewards else None
        return rpo_kernels.linear_rpo_loss(
            x.hidden,
            x.weight,
            x.labels,
            rewards,
            case.objective,
            ref_logps=reference,
            group_size=case.part.group_size,
            **self.options,
        ).loss


class OursInPlace(Ours):
    """The same with gradients written over the logits."""

    name, overwrites = "rpo_kernels, in place", True
    options: ClassVar = {"inplace_backward": True}
    from_hidden = None

    def from_logits(self, logits, labels):
        return super().from_logits(logits.view_as(logits), labels)  # a leaf cannot be overwritten

    def missing(self, case, device):
        return super().missing(case, device) or (
            None if case.part.trains else "nothing to do in place"
        )


class OursShortLogits(Ours):
    """The same with logits rounded to bf16, as all other providers do."""

    name = "rpo_kernels, bf16 logits"
    options: ClassVar = {"logits_dtype": torch.bfloat16}
    from_logits = None

    def missing(self, case, device):
        return super().missing(case, device) or (
            None if case.dtype == torch.bfloat16 else "for bf16 hidden states only"
        )


PROVIDERS = (
    Ours(),
    OursInPlace(),
    OursShortLogits(),
    Naive(),
    Compiled(),
    TorchLinear(),
    TRL(),
    Liger(),
    CutCrossEntropy(),
)
