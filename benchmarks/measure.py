"""Measurements: correctness first, then time, memory, and the share of the hardware's limits.

On a GPU time is CUDA events around one step, with the L2 cache flushed and another set of inputs
before each; on a CPU it is `time.perf_counter`. Memory is the peak of what the allocator was
asked for above the inputs, gradients included.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from cases import Case, Inputs
from providers import Provider
from torch import Tensor
from truth import Truth

from rpo_kernels.tools.memory import peak_bytes
from rpo_kernels.tools.timing import flush_cache, seconds


class Step:
    """A repeatable forward and backward of one provider on one case."""

    def __init__(self, case: Case, provider: Provider, inputs: list[Inputs]):
        self.case, self.provider, self.turn = case, provider, -1
        self.labels = inputs[0].labels
        order = provider.order(case.part, case.sequences)
        self.order = torch.tensor(order, device=inputs[0].labels.device)
        stays = order == sorted(order)
        self.sets = [x if stays else x.ordered(self.order) for x in inputs]
        self.pristine = self.sets if provider.overwrites else None
        if provider.overwrites:
            self.sets = [replace(x, logits=x.logits.detach().clone()) for x in self.sets]
        for x in self.sets:
            for name in ("logits", "hidden", "weight"):
                if getattr(x, name) is not None:
                    getattr(x, name).requires_grad_(name in case.part.trains)

    @property
    def inputs(self) -> Inputs:
        return self.sets[self.turn % len(self.sets)]

    def prepare(self) -> None:
        """Switch to the next set of inputs, clear gradients and flush the cache."""
        self.turn += 1
        for x in self.sets:
            for name in self.case.part.trains:
                getattr(x, name).grad = None
        if self.pristine:
            with torch.no_grad():
                self.inputs.logits.copy_(self.pristine[self.turn % len(self.sets)].logits)
        flush_cache(self.inputs.labels.device)

    def __call__(self) -> None:
        x, part, provider = self.inputs, self.case.part, self.provider
        options = {"softcap": part.softcap} if part.softcap else {}
        options |= {"entropy": True} if part.entropy else {}
        with torch.set_grad_enabled(bool(part.trains)):
            if part.loss:
                output, upstream = provider.loss(self.case, x), None
            elif part.start == "logits":
                output, upstream = provider.from_logits(x.logits, x.labels, **options), x.upstream
            else:
                output = provider.from_hidden(x.hidden, x.weight, x.labels, x.counts)
                upstream = x.upstream
            if part.trains:
                output.backward(upstream)
        both = output if part.entropy else (output, None)
        self.output, self.entropies = (None if y is None else y.detach() for y in both)

    def gradient(self, name: str) -> Tensor:
        """Return a gradient in the order of the case, as flat rows."""
        grad = getattr(self.inputs, name).grad
        if grad is None:
            raise RuntimeError(f"expected a gradient of {name}, got none")
        if name == "weight":
            return grad
        return grad[self.order.argsort()].flatten(0, 1)


# ---- correctness ---------------------------------------------------------------------------------


class Errors(NamedTuple):
    """Largest errors against float64."""

    absolute: float  # of a log-probability, an entropy or the loss, nats
    relative: dict[str, float]  # of each gradient, by norm
    verdict: str | None  # what is wrong, or None


def check(step: Step, truth: Truth) -> Errors:
    """Run once on the first set of inputs, and compare; NaN never passes."""
    step.turn = -1
    step.prepare()
    step()
    wrong, relative = [], {}
    if step.case.part.loss:
        absolute = abs(step.output.item() - truth.loss)
        if not absolute <= truth.loss_bound:
            wrong.append(f"loss off by {absolute:.2g}, bound {truth.loss_bound:.2g}")
    else:
        found = {"log-prob": (step.output, truth.logps, truth.logps_bound)}
        if step.entropies is not None:
            found["entropy"] = step.entropies, truth.entropies, 2 * truth.logps_bound
        absolute = 0.0
        for name, (value, true, bound) in found.items():
            error = (value[step.order.argsort()].double() - true).abs()
            absolute = max(absolute, error.max().item())
            if not bool((error <= bound).all()):
                excess = (error - bound).nan_to_num(nan=float("inf")).argmax()
                wrong.append(
                    f"{name} off by {error.flatten()[excess]:.2g}, bound "
                    f"{bound.flatten()[excess]:.2g}"
                )
    for name, sample in truth.gradients.items():
        gradient = step.gradient(name)
        error = (gradient[sample.index].double() - sample.value).norm().item()
        relative[name] = error / sample.value.norm().item()
        if not error <= sample.bound:
            wrong.append(f"gradient of {name} off by {error:.2g}, bound {sample.bound:.2g}")
        if name != "weight" and bool(gradient[step.labels.flatten() < 0].any()):
            wrong.append(f"gradient of {name} where nothing is scored")
    return Errors(absolute, relative, "; ".join(wrong) or None)


# ---- time and memory -----------------------------------------------------------------------------


def quartiles(times: list[float]) -> tuple[float, float, float]:
    if len(times) == 1:
        return (times[0],) * 3
    return tuple(statistics.quantiles(times, n=4, method="inclusive"))


def peak_of(step: Step, device: str) -> int:
    """Bytes that a step holds at a time above its inputs, gradients included."""
    step.prepare()
    gc.collect()
    return peak_bytes(step, device)


# ---- limits of the hardware ----------------------------------------------------------------------


class Ceilings:
    """Copy bandwidth and the time of a case's bare GEMMs, measured in the same run."""

    def __init__(self, device: str):
        self.device = device
        self.gemm_rates: dict[tuple, float] = {}
        elements = (1 << 30 if device == "cuda" else 1 << 26) // 4
        source, target = torch.randn(2, elements, device=device)
        copy = self._best(lambda: target.copy_(source))
        self.copy_rate = 2 * source.nbytes / copy

    def _best(self, step: Callable[[], object]) -> float:
        prepare = lambda: flush_cache(torch.device(self.device))
        seconds(step, prepare, self.device, 3)
        return statistics.median(seconds(step, prepare, self.device, 11))

    def gemm_rate(self, case: Case) -> float:
        """Return flop per second of the case's GEMMs only, with outputs in its dtype."""
        key = case.part.trains, case.model, case.scored, case.dtype
        if key not in self.gemm_rates:
            n, H, V = case.scored, case.model.H, case.model.V
            random = lambda *shape: torch.randn(shape, device=self.device, dtype=case.dtype)
            hidden, weight, logits = (
                random(n, H),
                random(V, H),
                torch.empty(n, V, device=self.device, dtype=case.dtype),
            )
            gemms = [lambda: torch.mm(hidden, weight.t(), out=logits)]
            if "hidden" in case.part.trains:
                gemms.append(lambda: torch.mm(logits, weight))
            if "weight" in case.part.trains:
                gemms.append(lambda: torch.mm(logits.t(), hidden))
            self.gemm_rates[key] = case.flop / sum(map(self._best, gemms))
        return self.gemm_rates[key]

    def limit(self, case: Case) -> tuple[float, str]:
        """Return the least seconds that a case can take on this hardware, and why."""
        if case.part.start == "logits":
            return (
                case.bytes / self.copy_rate,
                f"{case.bytes / 1e9:.3g} GB at {self.copy_rate / 1e9:.3g} GB/s",
            )
        rate = self.gemm_rate(case)
        return (
            case.flop / rate,
            f"{case.flop / 1e12:.3g} Tflop of bare GEMMs at {rate / 1e12:.3g} Tflop/s in "
            f"{str(case.dtype)[6:]}",
        )
