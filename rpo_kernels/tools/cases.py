"""The cases of `verify`: each makes inputs from a seed and compares ours, PyTorch and float64."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Generator, Tensor

from .. import (
    RPOOutput,
    linear_rpo_loss,
    preference_loss,
    reference,
    rpo_loss,
    token_logps,
    token_logps_and_entropy,
)
from ..objectives import COMPARISONS, DISTANCES, PRESETS, RPOObjective

FAMILY = list(itertools.product(DISTANCES, COMPARISONS))
TRANSFORMS: dict[str, dict[str, float]] = {
    "plain": {},
    "scaled": {"temperature": 0.7, "logit_scale": 1.3},
    "softcap": {"softcap": 30.0, "logit_scale": 0.5, "temperature": 1.5},
}
# options of the group pass; each set has one of each kind
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average, margin, sft mean": {
        "average": True,
        "margin": 0.3,
        "sft_weight": 0.2,
        "sft_normalizer": "mean",
    },
    "harmonic, sft tokens": {
        "reference": "harmonic",
        "sft_weight": 0.2,
        "sft_normalizer": "tokens",
    },
    "geometric, sft sum": {"reference": "geometric", "sft_weight": 0.2},
    "no reference, average": {"reference": "none", "average": True},
}
GUARD = 1 << 15  # elements before and after the rows: more than any tile
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Machine:
    """Where and how cases run.

    `keeps_bf16` tells whether stores to bf16 round (Triton's interpreter truncates them).
    """

    device: str
    backend: str
    keeps_bf16: bool


@dataclass(frozen=True)
class Quantity:
    """Largest errors of one output against float64: ours, PyTorch's, and the bound of ours."""

    name: str
    error: float
    pytorch: float
    allowed: float

    def share(self) -> float:
        """The error as a share of its bound."""
        if self.error == 0:
            return 0.0
        return self.error / self.allowed if self.allowed else float("inf")


@dataclass(frozen=True)
class Case:
    family: str
    name: str
    dtype: torch.dtype
    shape: str
    run: Any  # (Machine, Generator) -> list[Quantity]

    def words(self) -> set[str]:
        return set(
            f"{self.family} {self.name} {str(self.dtype)[6:]} {self.shape}".replace(",", "").split()
        )


def worst(ours: Tensor, truth: Tensor) -> float:
    """Return the largest absolute error.

    Equal infinities and NaNs agree; any other non-finite difference is infinite.
    """
    a, b = ours.detach().double(), truth.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, 0, (a - b).abs()).nan_to_num(nan=float("inf"))
    return float(error.max()) if error.numel() else 0.0


def size(x: Tensor) -> float:
    """Return the largest finite magnitude."""
    return (
        float(x.detach().double().abs().nan_to_num(posinf=0, neginf=0).max()) if x.numel() else 0.0
    )


def judged(name: str, ours: Tensor, theirs: Tensor, truth: Tensor, rounding: float) -> Quantity:
    """Compare ours and PyTorch's with float64.

    Our error may be 1.5 times PyTorch's plus `rounding`, since PyTorch may happen to be exact.
    """
    pytorch = worst(theirs, truth)
    return Quantity(name, worst(ours, truth), pytorch, 1.5 * pytorch + rounding)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Context in which new tensors hold NaN, so that elements which are not written show."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def poison(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-(2**30))

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: poison(empty(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k))),
        mock.patch.object(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k))),
    ):
        yield


# ---- vocabulary pass -----------------------------------------------------------------------------


def rows_among_nans(
    V: int, dtype: torch.dtype, layout: str, at: Machine, g: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits `[2, 3, V]`, labels, and the mask of the memory outside the logits.

    Rows are flat, ordinary, confident in the label, confident in another token, ignored, and with a
    maximum in the last column. All memory around them is NaN, so that out-of-bounds reads and
    writes show.
    """
    x = torch.randn(2, 3, V, generator=g) * 8
    labels = torch.randint(0, V, (2, 3), generator=g)
    x[0, 0] = 0.25
    x[0, 2, labels[0, 2]] += 40
    x[1, 0, 0] += 40
    labels[1, 1] = -100
    x[1, 2, -1] = x.max() + 3
    outer, inner = {"contiguous": (3 * V, V), "shifted": (4 * V, V), "padded": (3 * V + 9, V + 3)}[
        layout
    ]
    memory = torch.full((2 * GUARD + 2 * outer,), float("nan"), dtype=dtype, device=at.device)
    logits = memory.as_strided((2, 3, V), (outer, inner, 1), GUARD)
    logits.copy_(x)
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside.as_strided((2, 3, V), (outer, inner, 1), GUARD).fill_(False)
    return logits, labels.to(at.device), outside


def vocabulary(
    V: int,
    dtype: torch.dtype,
    transform: dict[str, Any],
    layout: str,
    entropy: bool,
    inplace: bool,
    at: Machine,
    g: Generator,
) -> list[Quantity]:
    logits, labels, outside = rows_among_nans(V, dtype, layout, at, g)
    weights = torch.randn(2, *labels.shape, generator=g).to(at.device)

    def pytorch(x: Tensor) -> list[Tensor]:
        x = x.detach().clone().requires_grad_()
        outputs = [
            f(x, labels, **transform)
            for f in (reference.token_logps, reference.token_entropy)[: 1 + entropy]
        ]
        return [
            *outputs,
            torch.autograd.grad(sum((y * w.to(y)).sum() for y, w in zip(outputs, weights)), x)[0],
        ]

    truth, theirs = pytorch(logits.double()), pytorch(logits)
    call = token_logps_and_entropy if entropy else token_logps
    leaf = logits.detach().requires_grad_()
    with poisoned_memory():
        results = call(
            leaf.view_as(leaf), labels, inplace_backward=inplace, backend=at.backend, **transform
        )
        outputs = [results] if isinstance(results, Tensor) else list(results)
        ours = [
            *outputs,
            torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs, weights)), leaf)[0],
        ]
    memory = leaf.detach().as_strided(outside.shape, (1,), 0)
    spoilt = int((~memory.isnan() & outside).sum())
    names = ["logps", "entropy", "dlogits"] if entropy else ["logps", "dlogits"]
    # fp32 roundings: of the value; of a sum of some log V nats; of the gradient, and half an ulp of
    # its dtype
    of_gradient = max(4 * EPS, torch.finfo(dtype).eps / 2) * size(truth[-1]) + (
        4 * EPS * 8.3 if entropy else 0
    )
    rounding = {"logps": 2 * EPS * size(truth[0]), "entropy": 4 * EPS * 8.3, "dlogits": of_gradient}
    found = [judged(*each, rounding[each[0]]) for each in zip(names, ours, theirs, truth)]
    found.append(Quantity("elements written around the logits", spoilt, 0, 0))
    lost_in_bf16 = dtype == torch.bfloat16 and not at.keeps_bf16
    return [x for x in found if not (lost_in_bf16 and x.name == "dlogits")]


# ---- group pass ----------------------------------------------------------------------------------


def batch(objective: RPOObjective, packed: bool, ragged: bool, at: Machine, g: Generator) -> tuple:
    """Return logits, labels, rewards and options for sequences of 0 to 5 scored tokens.

    Ragged groups include one of size 1 and an empty one.
    """
    V, counts, options = 5, [3, 1, 0, 5, 3, 3, 2, 2, 3, 2, 5, 3], {}
    shape = (sum(counts),) if packed else (12, 3)
    if packed:
        options["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    logits = torch.randn(*shape, V, generator=g) * 3
    labels = torch.randint(0, V, shape, generator=g)
    labels[torch.rand(shape, generator=g) < 0.25] = -100
    if not packed:
        labels[5] = -100
    groups = 6
    if ragged and objective.label is None:
        options["cu_groups"], groups = torch.tensor([0, 2, 3, 9, 9, 12], dtype=torch.int32), 5
    rewards = torch.randn(12, generator=g) * 2 if objective.uses_rewards else None
    if objective.reference != "none":
        several = objective.reference != "single"
        options["ref_logps"] = -5 * torch.rand((3, *shape) if several else shape, generator=g)
        if several:
            weights = torch.rand(3, groups, generator=g)
            options["ref_weights"] = weights / weights.sum(0)
    rewards = None if rewards is None else rewards.to(at.device)
    return (
        logits.to(at.device),
        labels.to(at.device),
        rewards,
        {k: v.to(at.device) for k, v in options.items()},
    )


def in_float64(options: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in options.items()
    }


def losses(
    names: tuple[str, ...],
    ours: RPOOutput,
    theirs: reference.ReferenceOutput,
    truth: reference.ReferenceOutput,
    objective: RPOObjective,
    gradients: Iterable[tuple[str, Tensor, Tensor, Tensor]],
) -> list[Quantity]:
    """Compare losses and rewards, and the given gradients.

    s = a (l - lref) rounds sums of about ten nats.
    """
    spread = 1 + size(truth.rewards)
    of = {
        "logps": 4 * size(truth.logps),
        "targets": 4 * size(truth.targets),
        "rewards": 8 * size(truth.rewards),
        "losses": 16 * (size(truth.losses) * spread + objective.scale),
    }
    of["loss"] = of["losses"]
    found = [
        judged(x, getattr(ours, x), getattr(theirs, x), getattr(truth, x), EPS * of[x])
        for x in of
        if x in names
    ]
    for name, mine, its, true in gradients:
        eps = max(32 * EPS * spread, torch.finfo(mine.dtype).eps)
        found.append(judged(name, mine, its, true, eps * size(true)))
    return found


def objectives(
    objective: RPOObjective, packed: bool, ragged: bool, at: Machine, g: Generator
) -> list[Quantity]:
    logits, labels, rewards, options = batch(objective, packed, ragged, at, g)

    def pytorch(x: Tensor) -> tuple:
        x = x.detach().clone().requires_grad_()
        wide = in_float64(options) if x.dtype == torch.float64 else options
        out = reference.rpo_loss(
            x, labels, None if rewards is None else rewards.to(x), objective, **wide
        )
        return out, torch.autograd.grad(out.loss, x)[0]

    (truth, true_grad), (theirs, their_grad) = pytorch(logits.double()), pytorch(logits)
    logits.requires_grad_()
    with poisoned_memory():
        ours = rpo_loss(logits, labels, rewards, objective, backend=at.backend, **options)
        (grad,) = torch.autograd.grad(ours.loss, logits)
    names = ("logps", "targets", "rewards", "losses", "loss")
    return losses(names, ours, theirs, truth, objective, [("dlogits", grad, their_grad, true_grad)])


def groups(objective: RPOObjective, K: int, at: Machine, g: Generator) -> list[Quantity]:
    logps, ref, rewards = (x.to(at.device) for x in torch.randn(3, 2 * K, generator=g))

    def pytorch(x: Tensor) -> tuple:
        x = x.detach().clone().requires_grad_()
        out = reference.preference_loss(
            x, rewards.to(x), objective, ref_logps=ref.to(x), group_size=K
        )
        return out, torch.autograd.grad(out.loss, x)[0]

    (truth, true_grad), (theirs, their_grad) = pytorch(logps.double()), pytorch(logps)
    logps.requires_grad_()
    with poisoned_memory():
        ours = preference_loss(
            logps, rewards, objective, ref_logps=ref, group_size=K, backend=at.backend
        )
        (grad,) = torch.autograd.grad(ours.loss, logps)
    found = losses(
        ("rewards", "losses", "loss"),
        ours,
        theirs,
        truth,
        objective,
        [("dlogps", grad, their_grad, true_grad)],
    )
    if objective.comparison != "pointwise":  # coefficients of a group sum to zero
        total = float(grad.double().sum().abs())
        found.append(
            Quantity(
                "sum of dlogps",
                total,
                float(their_grad.double().sum().abs()),
                8 * EPS * float(grad.abs().sum()),
            )
        )
    return found


# ---- linear path ---------------------------------------------------------------------------------


def linear(
    objective: RPOObjective, dtype: torch.dtype, workspace: int | None, at: Machine, g: Generator
) -> list[Quantity]:
    """Compare the linear path, with an upstream gradient of 3, which scales ready gradients."""
    logits, labels, rewards, options = batch(objective, True, True, at, g)
    H = 6
    shapes = (len(labels), H), (logits.shape[-1], H), (logits.shape[-1],)
    leaves = [torch.randn(shape, generator=g).to(at.device, dtype) for shape in shapes]

    def pytorch(*inputs: Tensor) -> tuple:
        h, w, b = leaves = [x.detach().clone().requires_grad_() for x in inputs]
        wide = in_float64(options) if h.dtype == torch.float64 else options
        z = torch.nn.functional.linear(h, w, b)
        out = reference.rpo_loss(
            z, labels, rewards.double() if h.dtype == torch.float64 else rewards, objective, **wide
        )
        return out, torch.autograd.grad(3 * out.loss, leaves)

    (truth, true_grads), (theirs, their_grads) = (
        pytorch(*(x.double() for x in leaves)),
        pytorch(*leaves),
    )
    h, w, b = [x.requires_grad_() for x in leaves]
    with poisoned_memory():
        ours = linear_rpo_loss(
            h,
            w,
            labels,
            rewards,
            objective,
            bias=b,
            workspace_bytes=workspace,
            backend=at.backend,
            **options,
        )
        grads = torch.autograd.grad(3 * ours.loss, leaves)
    gradients = zip(("dhidden", "dweight", "dbias"), grads, their_grads, true_grads)
    return losses(("logps", "rewards", "losses", "loss"), ours, theirs, truth, objective, gradients)


# ---- selection -----------------------------------------------------------------------------------


def cases(quick: bool, at: Machine) -> Iterator[Case]:
    """Yield cases of every kernel; in full, of every dtype and option, with real vocabularies."""
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
    layouts = itertools.cycle(["contiguous", "shifted", "padded"])
    switches = itertools.cycle([(False, False), (True, True), (False, True), (True, False)])
    # one element; odd and below a tile; one more than 16 bytes; one more than a tile; GPT-2 (odd);
    # Llama 2; Qwen 3
    vocabularies = [31, 4097] if quick else [1, 31, 257, 4097, 32_000, 50_257, 151_936]
    for V, (name, transform), dtype in itertools.product(
        vocabularies, TRANSFORMS.items(), (fp32, fp16, bf16)
    ):
        if quick and dtype == bf16 and name != "plain":
            continue
        layout, (entropy, inplace) = next(layouts), next(switches)
        what = ", ".join([name, layout, *["entropy"] * entropy, *["in place"] * inplace])
        run = partial(vocabulary, V, dtype, transform, layout, entropy, inplace)
        yield Case("vocabulary", what, dtype, f"2x3x{V}", run)
    if quick:
        run = partial(vocabulary, 50_257, fp32, {}, "contiguous", False, False)
        yield Case("vocabulary", "plain, contiguous", fp32, "2x3x50257", run)
    some = {name: getattr(RPOObjective, name)() for name in PRESETS}
    for (distance, comparison), (name, options) in itertools.product(FAMILY, OPTIONS.items()):
        some[f"{distance} {comparison}, {name}"] = RPOObjective(
            distance, 0.3, 0.7, comparison, **options
        )
    every = 3 if quick else 1
    for i, (name, objective) in enumerate(some.items()):
        for packed in (False, True):
            if (2 * i + packed) % every == 0:
                shape = "packed 32, ragged" if packed else "12x3, pairs"
                yield Case(
                    "objectives", name, fp32, shape, partial(objectives, objective, packed, packed)
                )
    for (i, (distance, comparison)), K in itertools.product(enumerate(FAMILY), (3, 8, 64, 70)):
        if not quick or K == (70, 3, 8)[i % 3]:
            run = partial(groups, RPOObjective(distance, 1.0, 1.0, comparison), K)
            yield Case("groups", f"{distance} {comparison}", fp32, f"2 of {K}", run)
    for (distance, comparison), dtype in itertools.product(
        FAMILY[:: 4 if quick else 1], (fp32, fp16, bf16)
    ):
        if dtype != bf16 or at.keeps_bf16:
            for workspace in (12 * 5 * 4, None):
                run = partial(
                    linear, RPOObjective(distance, 0.3, 0.7, comparison), dtype, workspace
                )
                what = "in units" if workspace else "in one"
                yield Case("linear", f"{distance} {comparison}", dtype, what, run)
