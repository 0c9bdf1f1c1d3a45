"""The forward that `attach` puts in place of a model's own, and which ends in a loss."""

from __future__ import annotations

import difflib
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from torch import Tensor, nn

from ... import (
    RPOOutput,
    linear_rpo_loss,
    linear_token_logps,
    linear_token_logps_and_entropy,
    shift_labels,
)
from .head import Transform, head_as, head_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Keywords by the function that they belong to; those that the model determines are read from it.
READ = {
    "hidden",
    "weight",
    "bias",
    "logit_scale",
    "softcap",
    "lora_hidden",
    "lora_weight",
    "weight_grad",
    "ref_hidden",
    "ref_weight",
    "ref_bias",
}
LOSS = set(inspect.signature(linear_rpo_loss).parameters) - READ - {"labels"}
TOKENS = set(inspect.signature(linear_token_logps).parameters) - READ - {"labels"}
TOKENS |= {"cu_seqlens", "output_token_logps", "output_entropies", "entropy_grad"}


FUSED: weakref.WeakSet[Callable] = weakref.WeakSet()  # every forward that `fused` has made


class Attachment(NamedTuple):
    """What one `attach` leaves on a model. It is there, not in a closure, to be deep-copied."""

    previous: Callable | None  # the forward on the instance before, such as accelerate's
    transform: Transform


class TokenLogps(NamedTuple):
    """Result of an attached model with `output_token_logps=True`.

    Attributes:
        logps: `[S, T]` fp32, or `[N]` if packed: at position t the log-probability of the label at
            t + 1, in nats; 0 where nothing is scored.
        entropies: same shape, with `output_entropies=True`; else None.
        aux_loss: auxiliary loss of a mixture of experts times its coefficient, if the model
            computes one; else None. Add it to a loss that you compute from logps.
    """

    logps: Tensor
    entropies: Tensor | None = None
    aux_loss: Tensor | None = None


def keywords_of(host: nn.Module) -> frozenset[str]:
    """Return the keywords that the model, its submodules or transformers read.

    Others would be ignored silently.
    """
    from transformers import PreTrainedModel
    from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
    from transformers.utils import TransformersKwargs

    known = {
        "use_cache",
        "return_dict",
        *TransformersKwargs.__annotations__,
        *FlashAttentionKwargs.__annotations__,
    }
    for forward in {
        type(module).forward for module in host.modules() if isinstance(module, PreTrainedModel)
    }:
        for parameter in inspect.signature(forward).parameters.values():
            if parameter.kind is not parameter.VAR_KEYWORD:
                known.add(parameter.name)
            # Unpack[a TypedDict], possibly the model's own
            for annotation in get_args(parameter.annotation):
                known |= getattr(annotation, "__annotations__", {}).keys()
        while hasattr(forward, "__wrapped__"):  # a decorator that accepts an argument's old name
            old_name = inspect.getclosurevars(forward).nonlocals.get("old_name")
            known |= {old_name} if isinstance(old_name, str) else set()
            forward = forward.__wrapped__
    return frozenset(known)


def fused(unfused: Callable, known: frozenset[str], level: int) -> Callable:
    """Extend the forward `unfused` by the keywords of `attach`; `known` are those it reads itself.

    `self` is an argument, so that a deep copy of a model runs itself. `level` says which of the
    model's attachments this is.
    """
    own = set(inspect.signature(unfused).parameters)
    ours = (READ | LOSS | TOKENS) - own

    @functools.wraps(unfused)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        previous, transform = self._rpo_attachments[level]
        original = previous or functools.partial(unfused, self)
        given = {name: x for name in ours if (x := kwargs.pop(name, None)) is not None}
        call = Call.of(f"{type(self).__name__}.forward", given, kwargs)
        if call is None:
            return original(*args, **kwargs)
        call.check_others(kwargs, known)
        if "use_cache" in own:
            kwargs["use_cache"] = False
        if not kwargs.pop("return_dict", self.config.return_dict):
            kwargs["return_dict"] = True
        with head_as(self, functools.partial(call.at_head, transform), call.after_head):
            output = original(*args, **kwargs)
        return call.finish(auxiliary_loss(self, output))

    FUSED.add(forward)
    return forward


class Call:
    """A call that asks for a loss or log-probabilities.

    It is made from the keywords, computed at the head, and finished after the forward.
    """

    def __init__(self, op: str, labels: Tensor, shifted: bool, options: dict[str, Any]):
        self.op, self.labels, self.shifted, self.options = op, labels, shifted, options
        self.result: RPOOutput | TokenLogps | None = None

    @classmethod
    def of(cls, op: str, given: dict[str, Any], others: dict[str, Any]) -> Call | None:
        """Make a call from our keywords and the others; None if ours request nothing.

        The labels are removed from the others.
        """
        if read := sorted(READ & given.keys()):
            instead = (
                "pass the reference as `ref_logps`"
                if read[0].startswith("ref_")
                else "it is read from the model"
            )
            raise ValueError(f"{op}: `{read[0]}` must be left out; {instead}")
        loss, tokens = "objective" in given, given.get("output_token_logps", False)
        if loss and tokens:
            raise ValueError(
                f"{op}: `objective` and `output_token_logps` ask for two results, got both; pass "
                "one of them"
            )
        if stray := sorted(
            given.keys() - (LOSS if loss else TOKENS if tokens else {"output_token_logps"})
        ):
            place = "`objective`" if stray[0] in LOSS else "`output_token_logps=True`"
            raise ValueError(f"{op}: `{stray[0]}` belongs to a call with {place}")
        if not loss and not tokens:
            return None
        if "entropy_grad" in given and not given.get("output_entropies", False):
            raise ValueError(f"{op}: `entropy_grad` belongs to a call with `output_entropies=True`")
        if others.pop("num_items_in_batch", None) is not None:
            raise ValueError(
                f"{op}: `num_items_in_batch` counts tokens, but the loss is a mean over groups; "
                "set the trainer's model_accepts_loss_kwargs to False, and pass `normalizer` if "
                "you accumulate gradients"
            )
        labels, shift_labels = others.pop("labels", None), others.pop("shift_labels", None)
        if (labels is None) == (shift_labels is None):
            raise ValueError(
                f"{op}: expected `labels` (unshifted, like input_ids) or `shift_labels`, by "
                f"keyword; got {'neither' if labels is None else 'both'}"
            )
        if "cu_seqlens" in given and (
            others.get("position_ids") is None or others.get("attention_mask") is not None
        ):
            raise ValueError(
                f"{op}: `cu_seqlens` needs `position_ids` that start at 0 in each sequence, and no "
                "`attention_mask`; they tell the model to keep packed sequences apart"
            )
        if "context_group" in given and labels is not None:
            raise ValueError(
                f"{op}: `context_group` needs `shift_labels`, got `labels`: the label of the last "
                "token of a rank is on another rank"
            )
        return cls(op, shift_labels if labels is None else labels, labels is None, given)

    def check_others(self, others: dict[str, Any], known: frozenset[str]) -> None:
        """Raise for unknown keywords: a model's `**kwargs` would hide a misspelt one."""
        for name in others.keys() - known:
            if others[name] is not None:
                ours = {
                    *(LOSS if "objective" in self.options else TOKENS),
                    "labels",
                    "shift_labels",
                }
                near = difflib.get_close_matches(name, sorted(ours), n=1)
                hint = f"; did you mean `{near[0]}`?" if near else "; leave it out of the batch"
                raise ValueError(
                    f"{self.op}: `{name}` is neither an argument of this model nor one of "
                    f"ours{hint}"
                )

    def at_head(self, transform: Transform, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Replace the head's forward.

        Returns what the model continues with: a tensor of our graph, for the head's hooks.
        """
        if self.result is not None:
            raise RuntimeError(f"{self.op}: the model ran its output embeddings twice")
        options: dict[str, Any] = {
            name: x.to(hidden.device) if isinstance(x, Tensor) else x
            for name, x in self.options.items()
        }
        labels, cu_seqlens = self.labels.to(hidden.device), options.get("cu_seqlens")
        if cu_seqlens is not None:
            hidden, labels = hidden.flatten(0, -2), labels.flatten()
        if self.shifted and labels.shape != hidden.shape[:-1]:
            raise ValueError(
                f"{self.op}: `shift_labels` must be {[*hidden.shape[:-1]]}, one for each position, "
                f"PEFT's virtual tokens included; got {[*labels.shape]}; pass `labels`, which PEFT "
                "extends, or pad with -100"
            )
        if not self.shifted:
            ignore_index = options.get("ignore_index", -100)
            labels = shift_labels(
                labels, labels != ignore_index, cu_seqlens=cu_seqlens, ignore_index=ignore_index
            )
        head: dict[str, Any] = head_weights(layer, hidden, transform)
        head |= {
            "labels": labels,
            "logit_scale": transform.logit_scale,
            "softcap": transform.softcap,
        }
        if "objective" in options:
            self.result = linear_rpo_loss(hidden, **head, **({"rewards": None} | options))
            return self.result.loss.reshape(1, 1, -1).clone()
        del options["output_token_logps"]
        options.pop("cu_seqlens", None)
        if options.pop("output_entropies", False):
            logps, entropies = linear_token_logps_and_entropy(hidden, **head, **options)
        else:
            logps, entropies = linear_token_logps(hidden, **head, **options), None
        self.result = TokenLogps(logps, entropies)
        return logps.reshape(1, 1, -1).clone()

    def after_head(self, layer: nn.Module, inputs: tuple, goes_on: Tensor) -> None:
        """Return the result as the last hook of the head.

        It is computed from what the other hooks return, `[1, 1, n]`, so that they take part in its
        backward. FSDP2 puts a hook on that tensor and ZeRO-3 a function after it; both gather the
        weights first. It is not a view, because FSDP2 needs a copy.
        """
        like = lambda x: goes_on.view(x.shape).clone()
        if isinstance(self.result, TokenLogps):
            self.result = self.result._replace(logps=like(self.result.logps))
        elif self.result is not None:
            self.result = self.result._replace(loss=like(self.result.loss))

    def finish(self, aux_loss: Tensor | None) -> RPOOutput | TokenLogps:
        """Return the result, with the model's auxiliary loss."""
        if self.result is None:
            raise RuntimeError(f"{self.op}: the model did not run its output embeddings")
        if aux_loss is None:
            return self.result
        if isinstance(self.result, TokenLogps):
            return self.result._replace(aux_loss=aux_loss)
        if self.options.get("reduction", "mean") != "mean" or "normalizer" in self.options:
            raise ValueError(
                f"{self.op}: the model's auxiliary loss is a mean, and can only be added to a mean "
                "(`reduction='mean'`, no `normalizer`); pass output_router_logits=False, or "
                "compute the loss from output_token_logps=True"
            )
        aux_loss = aux_loss.to(self.result.loss.device)
        return self.result._replace(loss=self.result.loss + aux_loss, aux_loss=aux_loss.detach())


def auxiliary_loss(host: PreTrainedModel, output: object) -> Tensor | None:
    """Return the auxiliary (load balancing) loss of a mixture of experts, times its coefficient.

    The coefficient is that of the model's own forward.
    """
    aux_loss = getattr(output, "aux_loss", None)
    if aux_loss is None:
        return None
    config = host.config.get_text_config()
    for place, name in (
        (host, "router_aux_loss_coef"),
        (host, "aux_loss_coef"),
        (config, "router_aux_loss_coef"),
    ):
        if hasattr(place, name):
            return getattr(place, name) * aux_loss
    raise ValueError(
        f"{type(host).__name__}.forward: expected the coefficient of the auxiliary loss as "
        "router_aux_loss_coef of the model or its config, got none; pass "
        "output_router_logits=False"
    )
