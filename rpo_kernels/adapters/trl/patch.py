"""TRL's fused LM head, computed by our kernels.

Every trainer of TRL gets its log-probabilities from one function,
`trl.trainer.utils._ChunkedLogProbFunction`, looked up when the model is called. Replacing that
name serves them all, and leaves losses, metrics and generation as they are.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Iterator
from types import CodeType
from typing import Any, NamedTuple

import torch
import trl.trainer.utils as host
from torch import Tensor
from torch.nn import Parameter
from transformers.utils import logging

from rpo_kernels import (
    linear_token_logps,
    linear_token_logps_and_entropy,
    token_logps,
    token_logps_and_entropy,
)

from .contract import refusal

logger = logging.get_logger(__name__)

NAME = "_ChunkedLogProbFunction"
ARGUMENTS = (
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class Found(NamedTuple):
    """TRL's function, as the installed TRL has it."""

    function: type[torch.autograd.Function]
    signature: inspect.Signature  # of its `apply`
    outputs: tuple[str, ...]  # what it returns after the log-probabilities, in order


# What TRL has, while ours takes its place.
_original: dict[str, Any] = {}
_found: Found
_active = 0


class LogProbs:
    """Stands where TRL has an autograd function: same arguments, same outputs, None for what is not
    asked.
    """

    @staticmethod
    def apply(*args: Any) -> tuple[Tensor | None, ...]:
        call = _found.signature.bind(*args)
        call.apply_defaults()
        why = _not_ours(call.arguments)
        if why:
            logger.warning_once(f"accelerate_trl: TRL's own log-probabilities are used where {why}")
            return _found.function.apply(*args)
        results = _log_probs(**{name: call.arguments[name] for name in ARGUMENTS})
        return (results["log_probs"], *(results.get(name) for name in _found.outputs))


def _log_probs(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    temperature: float,
    chunk_size: int,  # ours follows from the workspace
    final_logit_softcapping: float | None,
    logit_scale: float,
    outputs: tuple[str, ...],
) -> dict[str, Tensor]:
    """`log_probs` and the `outputs`, each `[N]`."""
    sharded = [x for x in (weight, bias) if isinstance(x, Parameter) and hasattr(x, "ds_id")]
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        # cast_lm_head_to_fp32
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    options: dict[str, Any] = {
        "bias": bias,
        "temperature": temperature,
        "logit_scale": logit_scale,
        "softcap": final_logit_softcapping,
        "count": targets.numel(),
    }
    rest = RowStatistics(set(outputs) & {"log_sum_sq_probs", "mean_logits", "is_top1"})
    options["on_logits"] = rest if rest.wanted and targets.numel() else None
    results = {}
    with _gathered_again(sharded) if sharded else contextlib.nullcontext():
        if "entropy" in outputs:
            results["log_probs"], results["entropy"] = linear_token_logps_and_entropy(
                hidden, weight, targets, **options
            )
        else:
            results["log_probs"] = linear_token_logps(hidden, weight, targets, **options)
    return results | {name: rest.rows(name, results["log_probs"]) for name in rest.wanted}


def _not_ours(arguments: dict[str, Any]) -> str | None:
    """Why this call stays TRL's, if it does."""
    parameters = _found.signature.parameters
    for name in arguments.keys() - set(ARGUMENTS):  # of a later release
        if not _same(arguments[name], parameters[name].default):
            return f"`{name}` is given, which our kernels do not know"
    temperature, logit_scale = arguments["temperature"], arguments["logit_scale"]
    if temperature <= 0 or logit_scale <= 0:
        return f"temperature or logit scale is not positive ({temperature}, {logit_scale})"
    if hasattr(arguments["weight"], "ds_id") and not hasattr(host, "maybe_gather_lm_head_ctx"):
        return "DeepSpeed ZeRO-3 shards the LM head, and TRL does not say how it gathers it"
    unknown = set(arguments["outputs"]) - {"log_probs", *OUTPUTS}
    return f"an unknown output is asked ({', '.join(sorted(unknown))})" if unknown else None


def _same(given: Any, default: Any) -> bool:
    plain = (bool, int, float, str, tuple)
    return given is default or (
        isinstance(given, plain) and isinstance(default, plain) and given == default
    )


@contextlib.contextmanager
def _gathered_again(sharded: list[Parameter]) -> Iterator[None]:
    """For a backward under DeepSpeed ZeRO-3, which takes parameters apart after the forward.

    TRL gathers the head around our forward; here our backward gathers what it reads of it once
    more. The whole tensor then lives as long as the backward holds it.
    """

    def whole(saved: Tensor) -> Tensor:
        for parameter in sharded:
            if saved is parameter:
                with host.maybe_gather_lm_head_ctx(parameter):
                    return parameter.detach()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, whole):
        yield


class RowStatistics:
    """Statistics of whole rows of logits for TRL's metrics, without gradients.

        z = softcap tanh(logit_scale x / softcap) / temperature,   p = softmax(z)

    They are `entropy` H(p), `log_sum_sq_probs` log sum p^2, `mean_logits` mean z, and `is_top1`,
    whether the label has the largest logit.
    """

    def __init__(self, wanted: set[str]):
        self.wanted = wanted
        self.parts: dict[str, list[Tensor]] = {name: [] for name in wanted}

    def __call__(self, logits: Tensor, labels: Tensor, transform: dict) -> None:
        """Process a chunk `[n, V]`; this is an `on_logits` of the linear functions."""
        temperature, scale, softcap = (
            transform[name] for name in ("temperature", "logit_scale", "softcap")
        )
        for name, parts in self.parts.items():
            if name == "entropy":
                parts.append(token_logps_and_entropy(logits, labels, **transform)[1])
            elif name == "is_top1":
                # z grows with x; the first of equal ones, as in TRL
                parts.append(logits.argmax(-1) == labels)
            # log p^2 = 2 z - 2 lse(z), and 2 z is z at half the temperature
            elif name == "log_sum_sq_probs":
                halved = token_logps(logits, labels, **transform | {"temperature": temperature / 2})
                parts.append(2 * token_logps(logits, labels, **transform) - halved)
            elif softcap is None:
                parts.append(logits.mean(-1, dtype=torch.float32) * (scale / temperature))
            else:
                parts.append(
                    (logits * (scale / softcap)).tanh_().mean(-1, dtype=torch.float32)
                    * (softcap / temperature)
                )

    def rows(self, name: str, like: Tensor) -> Tensor:
        """Return a statistic `[N]` of all rows, in the order in which they came."""
        return (
            torch.cat(self.parts[name])
            if self.parts[name]
            else like.new_zeros(0, dtype=None if name != "is_top1" else torch.bool)
        )


class Acceleration:
    """Result of `accelerate_trl`: call `undo()`, or use it as a context manager.

    Nested ones end with the last.
    """

    def __init__(self) -> None:
        global _active, _found
        if not _active:
            _found = look(getattr(host, NAME, None))
            for name, ours in ((NAME, LogProbs), ("_use_triton", _scores_valid_positions_only)):
                if hasattr(host, name):
                    _original[name] = getattr(host, name)
                    setattr(host, name, ours)
        _active += 1
        self._undone = False

    def undo(self) -> None:
        """Restore TRL's own function; a second call does nothing."""
        global _active
        if self._undone:
            return
        self._undone = True
        _active -= 1
        if not _active:
            while _original:
                setattr(host, *_original.popitem())

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def accelerate_trl() -> Acceleration:
    """Make TRL's trainers (DPO, KTO, GRPO, RLOO, SFT, subclasses) use our kernels.

        accelerate_trl()                # for the rest of the process

        with accelerate_trl():          # temporarily
            trainer.train()

    What else TRL asks for (entropy, mean logit, top-1, sum of squared probabilities) is read from
    the same chunks of logits: no further GEMM. Under DeepSpeed ZeRO-3 the backward gathers the head
    again, as TRL's does. Calls that the kernels cannot serve (scales that are not positive,
    arguments of a later TRL) go to TRL's own function; the log says so once.

    Whether it works with the installed TRL is seen, not read off its version: TRL's function must
    take the arguments that we know and give the numbers that ours gives, for a few rows on the CPU,
    once per process.

    Returns:
        `Acceleration`, whose `undo()` restores TRL.

    Raises:
        RuntimeError: where it does not; the message names what changed.
    """
    return Acceleration()


def _scores_valid_positions_only(device: torch.device) -> bool:
    """TRL selects positions where its Triton kernels run; ours take any number on a CPU, too."""
    return device.type == "cpu" or _original["_use_triton"](device)


# ---- what TRL's function is ----------------------------------------------------------------------


@functools.cache  # the numbers are compared once
def look(function: Any) -> Found:
    """What is known of TRL's function, after a look at its arguments, its callers and its numbers.

    Raises:
        RuntimeError: where ours cannot take its place.
    """
    op = "accelerate_trl"
    if not hasattr(function, "forward"):
        raise refusal(op, [f"trl.trainer.utils.{NAME} is {function!r}, not an autograd function"])
    ctx, *parameters = inspect.signature(function.forward).parameters.values()
    names = [parameter.name for parameter in parameters]
    lacks = [name for name in ARGUMENTS if name not in names]
    needs = [
        parameter.name
        for parameter in parameters
        if parameter.name not in ARGUMENTS and parameter.default is parameter.empty
    ]
    changes = [f"{NAME} takes ({', '.join([ctx.name, *names])})"] if lacks or needs else []
    changes += [f"it has no {', '.join(f'`{name}`' for name in lacks)}"] if lacks else []
    changes += [f"it needs {', '.join(f'`{name}`' for name in needs)}"] if needs else []
    caller = getattr(host, "add_fused_lm_head", None)
    if caller is None or NAME not in _names_in(inspect.unwrap(caller).__code__):
        changes.append(f"add_fused_lm_head does not call {NAME}")
    if changes:
        raise refusal(op, changes)
    signature = inspect.Signature(parameters)
    outputs = signature.parameters["outputs"].default
    if not isinstance(outputs, tuple):
        raise refusal(op, [f"{NAME} does not list what it returns: `outputs` is {outputs!r}"])
    found = Found(function, signature, outputs)
    if changes := _changed_numbers(found):
        raise refusal(op, changes)
    return found


def _names_in(code: CodeType) -> set[str]:
    """Global names that a function, or one defined inside it, reads."""
    inner = (_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


@torch.no_grad()
def _changed_numbers(found: Found) -> list[str]:
    """Outputs that are not ours, for five rows in fp32 that go through every argument."""
    waves = lambda *shape: torch.arange(math.prod(shape), device="cpu").sin().view(shape)
    call: dict[str, Any] = {
        "hidden": 3 * waves(5, 4),
        "weight": waves(7, 4),
        "bias": waves(7),
        "targets": torch.tensor([0, 6, 3, 2, 5], device="cpu"),
        "temperature": 0.7,
        "chunk_size": 3,
        "final_logit_softcapping": 2.0,
        "logit_scale": 1.3,
        "outputs": OUTPUTS,
    }
    bound = found.signature.bind(**call)
    bound.apply_defaults()
    with torch.autocast("cpu", enabled=False):
        ours = _log_probs(**call)
        try:
            theirs = found.function.apply(*bound.args)
        except Exception as error:
            return [f"{NAME} raises {type(error).__name__} on a CPU ({error})"]
    names = ("log_probs", *found.outputs)
    if len(theirs) != len(names):
        return [f"{NAME} returns {len(theirs)} tensors, not {len(names)} ({', '.join(names)})"]
    return [
        f"{NAME} returns another `{name}` ({x.tolist()}, not {ours[name].tolist()})"
        for name, x in zip(names, theirs)
        if name in ours and not torch.allclose(x.double(), ours[name].double(), atol=1e-4)
    ]
