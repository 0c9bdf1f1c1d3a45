"""Preference losses inside a model of transformers: any causal or vision-language model, with or
without PEFT.

    attach(model)
    objective = RPOObjective()
    out = model(**inputs, labels=labels, rewards=rewards, objective=objective, ref_logps=ref_logps)
    out.loss.backward()

The model's own forward runs, up to its head. There the loss takes the place of ``head(hidden)``, so
that no logits exist, and hooks of the model, of its layers and of the head itself (FSDP, ZeRO-3,
PEFT, accelerate) fire where they always do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ... import RPOObjective, RPOOutput
from .forward import LOSS, TOKENS, TokenLogps, fused, keywords_of
from .head import head_layers, host_of, linear_of, measure_transform, ordinary_tokens

__all__ = ["TokenLogps", "attach", "detach", "model_rpo_loss", "model_token_logps"]


def attach(model: nn.Module) -> nn.Module:
    """Teach a model's forward to return preference losses and token log-probabilities. In place;
    returns the model.

    Afterwards ``model(...)`` takes, beside its own arguments and **by keyword**:

    - ``objective`` (with ``rewards``, ``ref_logps``, ``group_size``, ``cu_groups``, ... as for
      :func:`linear_rpo_loss`): returns its :class:`RPOOutput`;
    - or ``output_token_logps=True`` (and ``output_entropies=True``): returns :class:`TokenLogps`;
    - ``labels`` ``[S, T]``, **unshifted**, as everywhere in transformers: ``labels[t]`` is
      ``input_ids[t]``, or -100 where it is not scored (prompt, padding, image). They are shifted
      here. Or ``shift_labels``, aligned with the logits already;
    - ``cu_seqlens`` for sequences packed into one row ``[1, N]``, together with position_ids that
      begin anew in each.

    The head's bias, its PEFT adapters, scales and soft caps of the logits belong to the model and
    are read from it. The loss of a mixture of experts that computes its auxiliary loss
    (``output_router_logits``) includes it, with the model's coefficient.
    Without these keywords forward is the original one: generation and evaluation do not change.
    With them, keywords that nobody
    reads are refused: models of transformers drop them without a word.

    Attach before wrapping in DDP, FSDP1 or ``torch.compile``, and after loading the weights:
    log-probabilities of eight tokens are compared with those of the model's own logits. Attaching
    again compares again. Deep copies are attached too. Under FSDP2 leave
    output_dtype of the MixedPrecisionPolicy alone: it would round losses and log-probabilities to
    16 bits.

    Raises:
        TypeError, ValueError: where the head is not one that the kernels compute, or the comparison
            fails.
    """
    host = host_of(model)
    if "_rpo_previous" in vars(host):
        detach(model)
    for layer in head_layers(host):
        linear_of(layer)
    vars(host)["_rpo_previous"] = vars(host).get("forward")  # accelerate's, if any
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        ids = ordinary_tokens(host, 9)
        logits_of = lambda: _own_logits(model, host, ids)
        own = logits_of()
        if getattr(host.config, "is_decoder", None) is False:  # BERT's kin see all tokens then
            other_end = torch.cat([ids[:, :-1], ids[:, :1]], 1)
            _check_causal(type(host).__name__, own, _own_logits(model, host, other_end))
        vars(host)["_rpo_transform"] = measure_transform(host, logits_of)
        vars(host)["forward"] = MethodType(fused(type(host).forward, keywords_of(host)), host)
        with torch.no_grad():
            _compare(
                type(host).__name__,
                model_token_logps(model, {"input_ids": ids, "labels": ids}).logps,
                own,
                ids,
            )
    except BaseException:
        _restore(host)
        raise
    finally:
        for module, flag in training.items():
            module.training = flag
    return model


def _is_attached(host: nn.Module) -> bool:
    return hasattr(vars(host).get("forward"), "is_fused")


def _check_attached(op: str, name: str, model: nn.Module) -> None:
    """A model that is not attached drops our keywords, and returns what it always does."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if modules and not any("_rpo_previous" in vars(module) for module in modules):
        raise ValueError(
            f"{op}: `{name}` must be an attached model, got a {type(model).__name__} that is not; "
            "call attach(model) first"
        )


def _restore(host: nn.Module) -> None:
    attributes = vars(host)
    previous = attributes.pop("_rpo_previous")
    attributes.pop("_rpo_transform", None)
    attributes.pop("forward", None)
    if previous is not None:
        attributes["forward"] = previous


@torch.no_grad()
def _own_logits(model: nn.Module, host: nn.Module, ids: Tensor) -> Tensor:
    """``[1, T, V]`` as the host returns them, before anything around it may round them."""
    forward, seen = host.forward, []

    def remember(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        seen.append(output.logits)
        return output

    vars(host)["forward"] = remember
    try:
        model(input_ids=ids)
    finally:
        vars(host)["forward"] = forward
    return seen[0]


def _check_causal(name: str, logits: Tensor, of_another_end: Tensor) -> None:
    """Logits before the last token, which are to know nothing of it."""
    change = (logits - of_another_end)[0, :-1].abs().max()
    if change > 16 * torch.finfo(logits.dtype).eps * logits.abs().max():
        raise ValueError(
            f"attach: expected a causal language model, got a {name} whose tokens attend to those "
            "that follow them; build it with config.is_decoder = True"
        )


def _compare(name: str, logps: Tensor, own_logits: Tensor, ids: Tensor) -> None:
    """Log-probabilities of the tokens that follow the first, ours and the model's own."""
    # after soft prompts
    ours, logits = (
        logps[0, -ids.shape[1] : -1].double(),
        own_logits[0, -ids.shape[1] : -1].double(),
    )
    theirs = logits.log_softmax(-1).gather(-1, ids[0, 1:, None].to(logits.device))[:, 0]
    # A logit is rounded once by each of the few operations that make it, and a log-probability is a
    # difference of two.
    tolerance = (4 * torch.finfo(own_logits.dtype).eps + 1e-5) * (
        1 + own_logits.abs().max().double()
    )
    error = (ours - theirs).abs().nan_to_num(nan=torch.inf)
    if not error.max() <= tolerance:
        worst = error.argmax()
        raise ValueError(
            f"attach: expected the token log-probability {theirs[worst]:.6f} of {name}'s own "
            f"logits, got {ours[worst]:.6f} from its hidden states, head, scale and cap; it cannot "
            "be attached, its logits are made in another way"
        )


def detach(model: nn.Module) -> nn.Module:
    """Undo :func:`attach`. Returns the model, its forward the one it had."""
    host = host_of(model)
    if not _is_attached(host):
        hint = (
            "; something has wrapped its forward since, undo that first"
            if "_rpo_previous" in vars(host)
            else ""
        )
        raise ValueError(f"detach: this {type(host).__name__} is not attached{hint}")
    _restore(host)
    return model


def model_token_logps(model: nn.Module, batch: Mapping[str, Any], **options: Any) -> TokenLogps:
    """Token log-probabilities of a batch (its model inputs, ``labels`` and, where packed,
    ``cu_seqlens``).

    Entries that only a loss reads (rewards, group_size, ...) are left out. Options:
    output_entropies, entropy_grad, temperature, logits_dtype, workspace_bytes, count, backend.
    """
    _check_attached("model_token_logps", "model", model)
    inputs = {name: x for name, x in batch.items() if name not in LOSS - TOKENS}
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
        batch: model inputs, ``labels``, ``rewards`` and what else :func:`attach` lists; groups are
            neighbours.
        objective: the loss.
        reference: attached model(s), as many as the objective has references
            (``reference="single"``: one, ``"none"``: none, ``"harmonic"``, ``"geometric"``: any
            number), run without gradients where batch holds no ref_logps. None: a PEFT model with
            its adapters off.
        options: further keywords of :func:`linear_rpo_loss`.

    Raises:
        ValueError, TypeError: for what does not fit; without any reference where one is needed.
    """
    models = _references(objective, reference)
    for name, each in [("model", model), *(("reference", each) for each in models)]:
        _check_attached("model_rpo_loss", name, each)
    inputs = {**batch, **options}
    if objective.reference != "none" and inputs.get("ref_logps") is None:
        inputs["ref_logps"] = _reference_logps(model, inputs, objective, models)
    return model(**inputs, objective=objective)


def _references(
    objective: RPOObjective, reference: nn.Module | Sequence[nn.Module] | None
) -> list[nn.Module]:
    """The models that were given, as many as the objective has references."""
    if reference is None:
        return []
    models = list(reference) if isinstance(reference, (Sequence, nn.ModuleList)) else [reference]
    several = (bool(models), "at least one model")
    fits, expected = {"single": (len(models) == 1, "one model"), "none": (not models, "None")}.get(
        objective.reference, several
    )
    if not fits:
        hint = (
            "; several need reference='harmonic' or 'geometric'"
            if objective.reference == "single" and models
            else ""
        )
        raise ValueError(
            f"model_rpo_loss: `reference` must be {expected} for an objective with "
            f"reference={objective.reference!r}, got {len(models)}{hint}"
        )
    return models


@torch.no_grad()
def _reference_logps(
    model: nn.Module, inputs: Mapping[str, Any], objective: RPOObjective, models: list[nn.Module]
) -> Tensor:
    if models:
        logps = [model_token_logps(each, inputs).logps for each in models]
    else:
        disable_adapter = getattr(getattr(model, "module", model), "disable_adapter", None)
        if disable_adapter is None:
            raise ValueError(
                "model_rpo_loss: `reference` must be an attached model for this objective, got "
                "None; or put `ref_logps` into the batch, or train a PEFT model, which is its own "
                "reference with its adapters off"
            )
        with disable_adapter():
            logps = [model_token_logps(model, inputs).logps]
    return torch.stack(logps) if objective.reference != "single" else logps[0]
