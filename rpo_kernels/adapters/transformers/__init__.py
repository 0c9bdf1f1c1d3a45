"""Preference losses in models of transformers: causal or vision-language, with or without PEFT.

    attach(model)
    objective = RPOObjective()
    out = model(**inputs, labels=labels, rewards=rewards, objective=objective, ref_logps=ref_logps)
    out.loss.backward()

The model's own forward runs up to its head, where the loss replaces `head(hidden)`. So no logits
exist, and the hooks of the model, of its layers and of the head (FSDP, ZeRO-3, PEFT, accelerate)
are called as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ... import RPOOutput, sequence_logps
from ...group_checks import check_objective
from ...sums import AnyObjective, Objective
from .forward import FUSED, LOSS, TOKENS, Attachment, TokenLogps, fused, keywords_of
from .head import (
    Transform,
    head_layers,
    host_of,
    learns_prompt,
    linear_of,
    measure_transform,
    ordinary_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Result = TypeVar("Result", RPOOutput, TokenLogps)

__all__ = ["TokenLogps", "attach", "detach", "model_rpo_loss", "model_token_logps"]


def attach(model: nn.Module) -> nn.Module:
    """Make a model's forward return preference losses and token log-probabilities, in place.

    Afterwards `model(...)` takes these arguments in addition to its own, **by keyword**:

    - `objective` (with `rewards`, `ref_logps`, `group_size`, `cu_groups`, ... as in
      `linear_rpo_loss`): return its `RPOOutput`;
    - or `output_token_logps=True` (optionally with `output_entropies=True`): return `TokenLogps`;
    - `labels` `[S, T]`, **unshifted**, as always in transformers: `labels[t]` is `input_ids[t]`, or
      -100 where it is not scored (prompt, padding, image); they are shifted inside. Or
      `shift_labels`, which are aligned with the logits already;
    - `cu_seqlens` for sequences packed into one row `[1, N]`, together with position_ids that
      restart in each sequence.

    The head's bias, its PEFT adapters, and scales and soft caps of the logits are read from the
    model. If a mixture of experts computes its auxiliary loss (`output_router_logits`), the loss
    includes it, with the model's coefficient. Without these keywords the original forward runs:
    generation and evaluation do not change. With them, unknown keywords raise, which models of
    transformers would ignore silently.

    Attach after loading the weights, and before wrapping in DDP, FSDP1 or `torch.compile`:
    log-probabilities of eight tokens are compared with those of the model's own logits. Attaching
    again compares again; where something has wrapped the forward since, as TRL's trainers do, it
    attaches on top of that. Deep copies of an attached model are attached; but once a trainer of
    TRL has wrapped a model, its copies run the old one's weights. Under FSDP2 do not set
    output_dtype of the MixedPrecisionPolicy: it would round losses and log-probabilities to 16
    bits.

    Args:
        model: a model of transformers, or a PEFT model of one.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: if the head is not one that the kernels compute, tokens see those
            that follow them, or the comparison fails.
    """
    host = host_of(model)
    if _is_attached(host):
        detach(model)
    for layer in head_layers(host):
        linear_of(layer)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        ids = ordinary_tokens(host, 9)
        logits_of = lambda: _own_logits(model, host, ids)
        own = logits_of()
        # where images come first, the prompt may see itself whole (PaliGemma)
        if host.config.get_text_config() is host.config:
            other_end = torch.cat([ids[:, :-1], ids[:, :1]], 1)
            _check_causal(type(host).__name__, own, _own_logits(model, host, other_end))
        _extend(host, measure_transform(host, logits_of))
        with torch.no_grad():
            _compare(
                type(host).__name__,
                model_token_logps(model, {"input_ids": ids, "labels": ids}).logps,
                own,
                ids,
            )
    except BaseException:
        if _is_attached(host):
            _restore(host)
        raise
    finally:
        for module, flag in training.items():
            module.training = flag
    return model


def _is_attached(host: nn.Module) -> bool:
    return getattr(vars(host).get("forward"), "__func__", None) in FUSED


def _check_attached(op: str, name: str, model: nn.Module) -> None:
    """A model that is not attached drops our keywords, and returns what it always does."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if modules and not any("_rpo_attachments" in vars(module) for module in modules):
        raise ValueError(
            f"{op}: `{name}` must be an attached model, got a {type(model).__name__} that is not; "
            "call attach(model) first"
        )


def _run(
    op: str, name: str, model: nn.Module, result: type[Result], inputs: dict[str, Any]
) -> Result:
    """Run an attached model. A forward that is no longer ours may drop our keywords."""
    out = model(**inputs)
    if not isinstance(out, result):
        raise ValueError(
            f"{op}: `{name}` must return {result.__name__}, got {type(out).__name__}; its forward "
            "was replaced since attach (unpickled, unwrapped or patched), call attach(model) again"
        )
    return out


def _token_logps(
    op: str, name: str, model: nn.Module, batch: Mapping[str, Any], **options: Any
) -> TokenLogps:
    inputs = {key: x for key, x in batch.items() if key not in LOSS - TOKENS}
    return _run(op, name, model, TokenLogps, inputs | options | {"output_token_logps": True})


def _set_forward(host: nn.Module, forward: Callable | None) -> None:
    """Put a forward on the instance; None leaves that of the class."""
    vars(host).pop("forward", None)
    if forward is not None:
        vars(host)["forward"] = forward


def _extend(host: nn.Module, transform: Transform) -> None:
    attachments = vars(host).setdefault("_rpo_attachments", [])
    forward = fused(type(host).forward, keywords_of(host), len(attachments))
    attachments.append(Attachment(vars(host).get("forward"), transform))
    _set_forward(host, MethodType(forward, host))


def _restore(host: nn.Module) -> None:
    attachments = vars(host)["_rpo_attachments"]
    _set_forward(host, attachments.pop().previous)
    if not attachments:
        del vars(host)["_rpo_attachments"]


@torch.no_grad()
def _own_logits(model: nn.Module, host: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the inner model's logits `[1, T, V]`, in the dtype in which its head made them."""
    before, forward, seen, dtypes = vars(host).get("forward"), host.forward, [], []

    def remember(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        seen.append(output.logits)
        return output

    handles = [
        layer.register_forward_hook(lambda layer, args, out: dtypes.append(out.dtype))
        for layer in head_layers(host)
    ]
    _set_forward(host, remember)
    try:
        model(input_ids=ids)
    finally:
        _set_forward(host, before)
        for handle in handles:
            handle.remove()
    if not dtypes:
        raise ValueError(
            f"attach: {type(host).__name__} must run its own head, but its forward did not; a copy "
            "of a model that a trainer of TRL has wrapped runs the old one, copy it before that"
        )
    return seen[0].to(dtypes[0])  # a wrapper, such as accelerate's, may have made them fp32


def _check_causal(name: str, logits: Tensor, of_another_end: Tensor) -> None:
    """Check that logits before the last token do not depend on it."""
    change = (logits - of_another_end)[0, :-1].abs().max()
    # not 0: with another token beside them, a mixture of experts may round the others differently
    if change > (16 * torch.finfo(logits.dtype).eps + 1e-4) * logits.abs().max():
        raise ValueError(
            f"attach: expected a causal language model, got a {name} whose tokens attend to those "
            "that follow them; build it with config.is_decoder = True (XLM, Flaubert: config.causal"
            " = True), if its config has that"
        )


def _compare(name: str, logps: Tensor, own_logits: Tensor, ids: Tensor) -> None:
    """Compare our log-probabilities of all tokens but the first with the model's own."""
    # soft prompts come first
    ours, logits = (
        logps[0, -ids.shape[1] : -1].double(),
        own_logits[0, -ids.shape[1] : -1].double(),
    )
    theirs = logits.log_softmax(-1).gather(-1, ids[0, 1:, None].to(logits.device))[:, 0]
    # Each of the few operations that make a logit rounds it once; a log-probability is a difference
    # of two.
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
    """Undo the last `attach`: restore the forward of before, and return the model."""
    host = host_of(model)
    if not _is_attached(host):
        hint = (
            "; something has wrapped its forward since, undo that first"
            if "_rpo_attachments" in vars(host)
            else ""
        )
        raise ValueError(f"detach: this {type(host).__name__} is not attached{hint}")
    _restore(host)
    return model


def model_token_logps(model: nn.Module, batch: Mapping[str, Any], **options: Any) -> TokenLogps:
    """Compute token log-probabilities of a batch with an attached model.

    Args:
        model: attached.
        batch: model inputs, `labels` and, if packed, `cu_seqlens`. Entries for losses only
            (rewards, group_size, ...) are ignored.
        options: output_entropies, entropy_grad, temperature, logits_dtype, workspace_bytes, count,
            backend.

    Returns:
        `TokenLogps`.

    Raises:
        ValueError: if the model is not attached, or its forward was replaced since.
    """
    op = "model_token_logps"
    _check_attached(op, "model", model)
    return _token_logps(op, "model", model, batch, **options)


def model_rpo_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    objective: AnyObjective,
    *,
    reference: nn.Module | Sequence[nn.Module] | None = None,
    **options: Any,
) -> RPOOutput:
    """Compute the loss of a batch, and its `ref_logps` if the batch has none.

    Args:
        model: attached, as it is trained (wrapped or not).
        batch: model inputs, `labels`, `rewards` and other arguments that `attach` lists; the
            responses of a group are contiguous.
        objective: the loss, or a weighted sum, as for `linear_rpo_loss`.
        reference: attached model(s), as many as the objective has references (`reference="single"`:
            one, `"none"`: none, `"harmonic"`, `"geometric"`: any number). They run without
            gradients, if the batch has no ref_logps. None: a PEFT model with its adapters disabled.
        options: further keywords of `linear_rpo_loss`. `on_logits` gets the policy's logits only.

    Returns:
        `RPOOutput`.

    Raises:
        ValueError, TypeError: if an argument does not fit, a reference is needed and there is
            none, or a model is not attached, or its forward was replaced since.
    """
    op = "model_rpo_loss"
    whole = check_objective(op, objective)
    models = _references(whole, reference)
    for name, each in [("model", model), *(("reference", each) for each in models)]:
        _check_attached(op, name, each)
    inputs = {**batch, **options}
    if whole.reference != "none" and inputs.get("ref_logps") is None:
        inputs["ref_logps"] = _reference_logps(model, inputs, whole, models)
    return _run(op, "model", model, RPOOutput, inputs | {"objective": whole})


def _references(
    objective: Objective, reference: nn.Module | Sequence[nn.Module] | None
) -> list[nn.Module]:
    """Return the given models, as many as the objective has references."""
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


def _unwrapped(model: nn.Module) -> nn.Module:
    return getattr(model, "module", model)  # by DDP, say


@torch.no_grad()
def _reference_logps(
    model: nn.Module, inputs: Mapping[str, Any], objective: Objective, models: list[nn.Module]
) -> Tensor:
    op = "model_rpo_loss"
    inputs = {name: x for name, x in inputs.items() if name != "on_logits"}
    if models:
        logps = [_token_logps(op, "reference", each, inputs).logps for each in models]
    else:
        disable_adapter = getattr(_unwrapped(model), "disable_adapter", None)
        if disable_adapter is None:
            raise ValueError(
                f"{op}: `reference` must be an attached model for this objective, got None; or put "
                "`ref_logps` into the batch, or train a PEFT model, which is its own reference "
                "with its adapters off"
            )
        with disable_adapter():
            logps = [_token_logps(op, "model", model, inputs).logps]
    if any(learns_prompt(_unwrapped(each)) for each in (model, *models)):  # rows of other lengths
        logps = [sequence_logps(x, cu_seqlens=inputs.get("cu_seqlens")) for x in logps]
    return torch.stack(logps) if objective.reference != "single" else logps[0]
