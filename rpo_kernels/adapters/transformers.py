"""Preference losses inside a model of transformers: any causal or vision-language model, with or without PEFT.

    attach(model)
    out = model(**inputs, labels=labels, rewards=rewards, objective=RPOObjective(), ref_logps=ref_logps)
    out.loss.backward()

The model's own forward runs, up to its head. There the loss takes the place of ``head(hidden)``, so that no logits exist, and
hooks of the model, of its layers and of the head itself (FSDP, ZeRO-3, PEFT, accelerate) fire where they always do.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import (
    RPOObjective,
    RPOOutput,
    linear_rpo_loss,
    linear_token_logps,
    linear_token_logps_and_entropy,
    shift_labels,
)
from .lm_head import Transform, head_as, head_layers, head_weights, host_of, measure_transform, ordinary_tokens

__all__ = ["TokenLogps", "attach", "detach", "model_rpo_loss", "model_token_logps"]


class TokenLogps(NamedTuple):
    """What the model returns for ``output_token_logps=True``.

    Attributes:
        logps: ``[S, T]`` fp32, or ``[N]`` if packed: at position t the log-probability of the label at t + 1, in nats; 0 where
            nothing is scored.
        entropies: same shape, with ``output_entropies=True``; else None.
        aux_loss: the auxiliary loss of a mixture of experts times its coefficient, where the model computes one; else None.
            Add it to a loss that you make of logps.
    """

    logps: Tensor
    entropies: Tensor | None
    aux_loss: Tensor | None


def attach(model: nn.Module) -> nn.Module:
    """Teach a model's forward to return preference losses and token log-probabilities. In place; returns the model.

    Afterwards ``model(...)`` takes, beside its own arguments and **by keyword**:

    - ``objective`` (with ``rewards``, ``ref_logps``, ``group_size``, ``cu_groups``, ... as for :func:`linear_rpo_loss`): returns
      its :class:`RPOOutput`;
    - or ``output_token_logps=True`` (and ``output_entropies=True``): returns :class:`TokenLogps`;
    - ``labels`` ``[S, T]``, **unshifted**, as everywhere in transformers: ``labels[t]`` is ``input_ids[t]``, or -100 where it
      is not scored (prompt, padding, image). They are shifted here. Or ``shift_labels``, aligned with the logits already;
    - ``cu_seqlens`` for sequences packed into one row ``[1, N]``, together with position_ids that begin anew in each.

    The head's bias, its PEFT adapters, scales and soft caps of the logits belong to the model and are read from it. The loss of a
    mixture of experts that computes its auxiliary loss (``output_router_logits``) includes it, with the model's coefficient.
    Without these keywords forward is the original one: generation and evaluation do not change.

    Attach before wrapping in DDP, FSDP1 or ``torch.compile``, and after loading the weights: log-probabilities of eight tokens are
    compared with those of the model's own logits.

    Raises:
        TypeError, ValueError: where the head is not one that the kernels compute, or the comparison fails.
    """
    host = host_of(model)
    if _is_attached(host):
        raise ValueError(f"attach: this {type(host).__name__} is attached already")
    head_layers(host)
    previous = vars(host).get("forward")  # accelerate's, if any
    vars(host)["_rpo_previous"] = previous
    vars(host)["forward"] = MethodType(_fused(previous or type(host).forward), host)
    try:
        _check(model, host)
    except BaseException:
        detach(model)
        raise
    return model


def _is_attached(host: nn.Module) -> bool:
    return hasattr(vars(host).get("forward"), "_rpo_attached")


@torch.no_grad()
def _check(model: nn.Module, host: nn.Module) -> None:
    """Measure what the model does to its logits, then compare log-probabilities of eight tokens with those of its own."""
    ids, seen = ordinary_tokens(host, 9), []

    def own_logits() -> Tensor:
        model(input_ids=ids, _rpo_seen=seen)
        return seen.pop()

    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        own = own_logits()
        host._rpo_transform = measure_transform(host, own_logits)
        ours = model(input_ids=ids, labels=ids, output_token_logps=True).logps[0, :-1].double()
    finally:
        for module, flag in training.items():
            module.training = flag
    theirs = own[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None].to(own.device))[:, 0]
    # A logit is rounded once by each of the few operations that make it, and a log-probability is a difference of two.
    tolerance = (4 * torch.finfo(own.dtype).eps + 1e-5) * (1 + own.abs().max().double())
    error = (ours - theirs).abs().nan_to_num(nan=torch.inf)
    if not error.max() <= tolerance:
        worst = error.argmax()
        raise ValueError(
            f"attach: {type(host).__name__} has log-probability {theirs[worst]:.6f} of a token by its own logits, and "
            f"{ours[worst]:.6f} by its hidden states, head, scale and cap; its head is not what it seems"
        )


def detach(model: nn.Module) -> nn.Module:
    """Undo :func:`attach`. Returns the model, its forward the one it had."""
    host = host_of(model)
    if not _is_attached(host):
        hint = "; something has wrapped its forward since, undo that first" if "_rpo_previous" in vars(host) else ""
        raise ValueError(f"detach: this {type(host).__name__} is not attached{hint}")
    previous = vars(host).pop("_rpo_previous")
    vars(host).pop("_rpo_transform", None)
    del vars(host)["forward"]
    if previous is not None:
        vars(host)["forward"] = previous
    return model


def model_token_logps(model: nn.Module, batch: Mapping[str, Any], **options: Any) -> TokenLogps:
    """Token log-probabilities of a batch (its model inputs, ``labels`` and, where packed, ``cu_seqlens``).

    Entries that only a loss reads (rewards, group_size, ...) are left out. Options: output_entropies, temperature, logits_dtype,
    workspace_bytes, count, backend.
    """
    inputs = {name: x for name, x in batch.items() if name not in _LOSS - _TOKENS}
    return model(**inputs, output_token_logps=True, **options)


def model_rpo_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    objective: RPOObjective,
    *,
    reference: nn.Module | Sequence[nn.Module] | None = None,
    **options: Any,
) -> RPOOutput:
    """The loss of a batch, and of its reference where it brings no ``ref_logps``.

    Args:
        model: attached, as it is trained (wrapped or not).
        batch: model inputs, ``labels``, ``rewards`` and what else :func:`attach` lists; groups are neighbours.
        objective: the loss.
        reference: attached model(s), run without gradients if the objective needs a reference and batch holds no ref_logps.
            None: a PEFT model with its adapters off.
        options: further keywords of :func:`linear_rpo_loss`.

    Raises:
        ValueError, TypeError: for what does not fit; without any reference where one is needed.
    """
    inputs = {**batch, **options}
    if objective.reference != "none" and inputs.get("ref_logps") is None:
        inputs["ref_logps"] = _reference_logps(model, inputs, objective, reference)
    return model(**inputs, objective=objective)


@torch.no_grad()
def _reference_logps(model, inputs, objective, reference) -> Tensor:
    if reference is None:
        disable_adapter = getattr(getattr(model, "module", model), "disable_adapter", None)
        if disable_adapter is None:
            raise ValueError(
                "model_rpo_loss: this objective compares with a reference: pass `reference=` (an attached model), put `ref_logps` "
                "into the batch, or train a PEFT model, whose reference is itself with the adapter off"
            )
        with disable_adapter():
            logps = [model_token_logps(model, inputs).logps]
    else:
        models = reference if isinstance(reference, Sequence) else [reference]
        logps = [model_token_logps(each, inputs).logps for each in models]
    return torch.stack(logps) if objective.reference != "single" else logps[0]


# ---- the forward ------------------------------------------------------------------------------------------------------

_READ = {
    "hidden", "weight", "bias", "logit_scale", "softcap", "lora_hidden", "lora_weight", "weight_grad",
    "ref_hidden", "ref_weight", "ref_bias",
}  # fmt: skip
_LOSS = set(inspect.signature(linear_rpo_loss).parameters) - _READ - {"labels"}
_TOKENS = set(inspect.signature(linear_token_logps).parameters) - _READ - {"labels"} | {"cu_seqlens"}
_SWITCHES = {"output_token_logps", "output_entropies"}


def _fused(unfused):
    """The forward with the keywords of :func:`attach`. ``self`` is an argument, so that a deep copy runs itself."""
    own = set(inspect.signature(unfused).parameters)
    ours = (_LOSS | _TOKENS | _READ | _SWITCHES) - own

    @functools.wraps(unfused)
    def forward(self, *args, **kwargs):
        original = self._rpo_previous or MethodType(unfused, self)
        seen = kwargs.pop("_rpo_seen", None)
        given = {name: kwargs.pop(name) for name in ours if name in kwargs}
        call = _Call.of(f"{type(self).__name__}.forward", given, kwargs)
        if call is None:
            output = original(*args, **kwargs)
            if seen is not None:
                seen.append(output.logits)
            return output
        if "use_cache" in own:
            kwargs["use_cache"] = False
        if not kwargs.pop("return_dict", self.config.return_dict):
            kwargs["return_dict"] = True
        with head_as(self, functools.partial(call.at_head, self._rpo_transform)):
            output = original(*args, **kwargs)
        return call.finish(_auxiliary_loss(self, output))

    forward._rpo_attached = True
    return forward


class _Call:
    """A call that asks for one of our results: made from its keywords, computed at the head, finished after the forward."""

    def __init__(self, op: str, function, labels: Tensor, shifted: bool, options: dict[str, Any]):
        self.op, self.function, self.labels, self.shifted, self.options = op, function, labels, shifted, options
        self.result = None

    @classmethod
    def of(cls, op: str, given: dict[str, Any], kwargs: dict[str, Any]) -> _Call | None:
        """None where ``given``, our keywords of a call, ask for nothing. ``kwargs`` are the others; labels are taken out."""
        if read := sorted(_READ & given.keys()):
            raise ValueError(f"{op}: `{read[0]}` is read from the model; leave it out")
        tokens, entropies = given.pop("output_token_logps", False), given.pop("output_entropies", False)
        loss = given.get("objective") is not None
        if tokens and loss:
            raise ValueError(f"{op}: `objective` and `output_token_logps` ask for two results; pass one of them")
        wanted = _TOKENS if tokens else _LOSS if loss else set()
        if stray := sorted(given.keys() - wanted) or ["output_entropies"] * (entropies and not tokens):
            place = "`output_token_logps=True`" if stray[0] not in _LOSS else "`objective=`"
            raise ValueError(f"{op}: `{stray[0]}` belongs to a call with {place}")
        if not wanted:
            return None
        if kwargs.pop("num_items_in_batch", None) is not None:
            raise ValueError(
                f"{op}: `num_items_in_batch` counts tokens, but the loss is a mean over groups; set the trainer's "
                "model_accepts_loss_kwargs to False, and pass `normalizer` where gradients accumulate"
            )
        labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        if (labels is None) == (shift_labels is None):
            raise ValueError(f"{op}: pass `labels` (unshifted, like input_ids) or `shift_labels`, one of them, by keyword")
        if given.get("cu_seqlens") is not None:
            if kwargs.get("position_ids") is None or kwargs.get("attention_mask") is not None:
                raise ValueError(
                    f"{op}: `cu_seqlens` needs `position_ids` that begin anew in each sequence, and no `attention_mask`: from "
                    "these a model knows that it must keep packed sequences apart"
                )
        function = linear_rpo_loss
        if tokens:
            function = linear_token_logps_and_entropy if entropies else linear_token_logps
        return cls(op, function, labels if shift_labels is None else shift_labels, labels is None, given)

    def at_head(self, transform: Transform, layer: nn.Module, hidden: Tensor) -> Tensor:
        """In place of the head's forward. Returns what the model goes on with: a tensor of our graph, for hooks of the head."""
        if self.result is not None:
            raise RuntimeError(f"{self.op}: the model ran its output embeddings twice")
        options = {name: x.to(hidden.device) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        labels = self.labels.to(hidden.device)
        cu_seqlens = options.get("cu_seqlens")
        if cu_seqlens is not None:
            hidden, labels = hidden.flatten(0, -2), labels.flatten()
        if not self.shifted:
            ignore_index = options.get("ignore_index", -100)
            labels = shift_labels(labels, labels != ignore_index, cu_seqlens=cu_seqlens, ignore_index=ignore_index)
        head = head_weights(layer, hidden, transform.vocabulary)
        head |= {"logit_scale": transform.logit_scale, "softcap": transform.softcap}
        if self.function is linear_rpo_loss:
            self.result = linear_rpo_loss(hidden, labels=labels, **head, **({"rewards": None} | options))
            loss = self.result.loss.reshape(1, 1, -1)
            self.result = self.result._replace(loss=loss.view(self.result.loss.shape))
            return loss
        options.pop("cu_seqlens", None)
        result = self.function(hidden, labels=labels, **head, **options)
        both = torch.stack(result if isinstance(result, tuple) else (result,))
        self.result = TokenLogps(both[0], both[1] if len(both) > 1 else None, None)
        return both.reshape(1, 1, -1)

    def finish(self, aux_loss: Tensor | None) -> RPOOutput | TokenLogps:
        if self.result is None:
            raise RuntimeError(f"{self.op}: the model did not run its output embeddings")
        if aux_loss is None:
            return self.result
        if isinstance(self.result, TokenLogps):
            return self.result._replace(aux_loss=aux_loss)
        if self.options.get("reduction", "mean") != "mean" or self.options.get("normalizer") is not None:
            raise ValueError(
                f"{self.op}: the model's auxiliary loss is a mean, and adds to a loss that is one too (`reduction='mean'`, no "
                "`normalizer`); pass output_router_logits=False, or make a loss of output_token_logps=True"
            )
        return self.result._replace(loss=self.result.loss + aux_loss.to(self.result.loss.device))


def _auxiliary_loss(host: nn.Module, output) -> Tensor | None:
    """Load balancing of a mixture of experts, times the coefficient with which the model's own forward adds it."""
    aux_loss = getattr(output, "aux_loss", None)
    if aux_loss is None:
        return None
    for place, name in (
        (host, "router_aux_loss_coef"),
        (host, "aux_loss_coef"),
        (host.config.get_text_config(), "router_aux_loss_coef"),
    ):
        if hasattr(place, name):
            return getattr(place, name) * aux_loss
    raise ValueError(
        f"{type(host).__name__}.forward: it computes an auxiliary loss of unknown weight; pass output_router_logits=False"
    )
