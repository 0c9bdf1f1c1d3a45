"""Providers: rpo_kernels, naive PyTorch, and each library that computes the same numbers.

A provider turns logits, or hidden states and an lm_head, into token log-probabilities `[S, T]` (0
where the label is -100; if asked, with entropies beside them), and these into a loss. Each calls
its package as that package's own trainers and examples do, with default settings.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from typing import ClassVar

import torch
import torch.nn.functional as F
from cases import KTO_BASELINE, SIMPO_MARGIN, Case, Inputs, Part
from torch import Tensor

import rpo_kernels


class Provider:
    """A way to compute the loss head.

    `from_logits` and `from_hidden` are None where it has none. `counts`: scored tokens of
    each sequence.
    """

    name: str
    package = "torch"  # its version is reported
    triton = False  # whether its only backend is Triton on a GPU
    overwrites = False  # whether the backward overwrites the logits
    has_softcap = has_entropy = False  # from logits
    compiles = False  # whether torch.compile takes its time for each shape

    def from_logits(self, logits: Tensor, labels: Tensor, **options: object) -> Tensor | tuple:
        """`options`: softcap and entropy of the part, where it has them."""
        raise NotImplementedError

    def from_hidden(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, counts: tuple[int, ...]
    ) -> Tensor:
        raise NotImplementedError

    def loss(self, case: Case, x: Inputs) -> Tensor:
        """Of the case's part, with reference log-probabilities of 0."""
        logps = self.from_hidden(x.hidden, x.weight, x.labels, x.counts).sum(1)
        s = case.beta * logps
        if case.part.loss == "kto":
            gain = (s - KTO_BASELINE) * is_chosen(s)
            return (1 - gain.sigmoid()).mean()
        if case.part.loss == "rpo":
            s = s.view(-1, case.part.group_size)
            target = x.rewards.view(s.shape).log_softmax(1)
            return F.kl_div(s.log_softmax(1), target, log_target=True, reduction="batchmean")
        margin = 0.0
        if case.part.loss == "simpo":
            s, margin = s / torch.tensor(x.counts, device=s.device), SIMPO_MARGIN
        chosen, rejected = s.view(-1, 2).unbind(1)
        return -F.logsigmoid(chosen - rejected - margin).mean()

    def order(self, part: Part, sequences: int) -> list[int]:
        """How it wants the sequences; [chosen, rejected, chosen, rejected, ...] if they stay as
        they are.
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
        if case.part.entropy and not self.has_entropy:
            return "has no entropies"
        if case.part.softcap and not self.has_softcap:
            return "has no softcap"
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


def is_chosen(s: Tensor) -> Tensor:
    """1 for chosen responses, -1 for rejected ones `[S]`."""
    return 1 - 2 * (torch.arange(len(s), device=s.device) % 2)


class Naive(Provider):
    """fp32 log_softmax and gather of every row, as trainers without a fused head do."""

    name = "naive PyTorch"
    has_softcap = has_entropy = True

    def from_logits(self, logits, labels, softcap=None, entropy=False):
        z = logits.float()
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        every = torch.log_softmax(z, -1)
        logps = every.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        logps = torch.where(labels != -100, logps, 0)
        if not entropy:
            return logps
        return logps, torch.where(labels != -100, -(every.exp() * every).sum(-1), 0)

    def from_hidden(self, hidden, weight, labels, counts):
        return self.from_logits(F.linear(hidden, weight), labels)


class Compiled(Naive):
    """The same under torch.compile, compiled for each shape."""

    name, compiles = "torch.compile", True

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

    def from_hidden(self, hidden, weight, labels, counts):
        options = torch.nn.LinearCrossEntropyOptions()
        losses = F.linear_cross_entropy(
            hidden.flatten(0, -2), weight, labels.flatten(), reduction="none", options=options
        )
        return -losses.float().view(labels.shape)


class TRL(Provider):
    """`trl.kernels`, as the fused head of TRL's DPO, KTO and GRPO trainers calls them: scored
    rows only, in chunks of 32,768 columns.
    """

    name, package, has_entropy = "TRL", "trl", True
    columns = 32_768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE

    def missing(self, case, device):
        reason = super().missing(case, device)
        if reason is None and case.part.start == "logits" and device != "cuda":
            return "its kernel from logits runs on a GPU only"
        if reason is None and case.part.trains and importlib.util.find_spec("datasets") is None:
            return "its backward imports trl.trainer, which needs the package datasets"
        return reason

    def from_logits(self, logits, labels, entropy=False):
        from trl.kernels import selective_log_softmax_and_entropy

        both = selective_log_softmax_and_entropy(logits, labels, row_mask=labels != -100)
        return both if entropy else both[0]

    def from_hidden(self, hidden, weight, labels, counts):
        from trl.kernels import ChunkedLogProbFunction

        scored = labels != -100
        logps, *_ = ChunkedLogProbFunction.apply(
            hidden[scored], weight, None, labels[scored], 1.0, self.columns, None, 1.0, ()
        )
        return logps.new_zeros(labels.shape).masked_scatter(scored, logps)


class Liger(Provider):
    """`liger_kernel.chunked_loss`: KTO, and DPO and SimPO of pairs, all chosen responses before
    all rejected ones; no log-probabilities.
    """

    name, package, compiles = "Liger", "liger-kernel", True
    from_logits = None

    def missing(self, case, device):
        if case.part.loss not in ("dpo", "simpo", "kto"):
            return "has losses only: DPO, SimPO, KTO"
        return super().missing(case, device)

    def order(self, part, sequences):
        if part.loss == "kto":
            return super().order(part, sequences)
        return [*range(0, sequences, 2), *range(1, sequences, 2)]

    def loss(self, case, x):
        from liger_kernel import chunked_loss

        if case.part.loss == "kto":
            kto = chunked_loss.LigerFusedLinearKTOLoss(beta=case.beta)
            desirable, kl = is_chosen(x.labels) > 0, x.rewards.new_tensor(KTO_BASELINE)
            return kto(x.hidden, x.weight, x.labels, preference_labels=desirable, kl=kl)[0]
        if case.part.loss == "simpo":
            head = chunked_loss.LigerFusedLinearSimPOLoss(
                beta=case.beta, gamma=SIMPO_MARGIN, compute_nll_loss=False
            )
        else:
            head = chunked_loss.LigerFusedLinearDPOLoss(beta=case.beta, use_ref_model=False)
        return head(x.weight, x.hidden, x.labels)[0]


class CutCrossEntropy(Provider):
    """Apple's `linear_cross_entropy` with its default gradient filter."""

    name, package, triton = "cut-cross-entropy", "cut-cross-entropy", True
    from_logits = None

    def from_hidden(self, hidden, weight, labels, counts):
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(hidden, weight, labels, reduction="none").float()


class Ours(Provider):
    """This library, default settings: fp32 logits on the linear path. It is told the number of
    scored tokens, as by a trainer, whose collator made the labels.
    """

    name, package = "rpo_kernels", "rpo_kernels"
    has_softcap = has_entropy = True
    options: ClassVar = {}

    def from_logits(self, logits, labels, softcap=None, entropy=False):
        call = rpo_kernels.token_logps_and_entropy if entropy else rpo_kernels.token_logps
        return call(logits, labels, softcap=softcap, **self.options)

    def from_hidden(self, hidden, weight, labels, counts):
        return rpo_kernels.linear_token_logps(
            hidden, weight, labels, count=sum(counts), **self.options
        )

    def loss(self, case, x):
        if case.part.loss == "kto":
            return super().loss(case, x)
        has_reference = case.objective.reference != "none"
        return rpo_kernels.linear_rpo_loss(
            x.hidden,
            x.weight,
            x.labels,
            x.rewards if case.objective.uses_rewards else None,
            case.objective,
            ref_logps=torch.zeros_like(x.rewards) if has_reference else None,
            group_size=case.part.group_size,
            counts=x.counts,
            **self.options,
        ).loss


class OursInPlace(Ours):
    """The same with gradients written over the logits."""

    name, overwrites = "rpo_kernels, in place", True
    options: ClassVar = {"inplace_backward": True}
    from_hidden = None

    def from_logits(self, logits, labels, **options):
        # a leaf is not overwritten
        return super().from_logits(logits.view_as(logits), labels, **options)

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
