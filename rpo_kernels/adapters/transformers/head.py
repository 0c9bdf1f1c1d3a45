"""The head of a model of transformers: its modules, weights, and the transform of its logits."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# (layer, hidden) -> what the model continues with, in place of logits
HeadFunction = Callable[[nn.Module, Tensor], Tensor]


class Transform(NamedTuple):
    """What the model does to the logits of its head."""

    logit_scale: float
    softcap: float | None
    vocabulary: int  # number of columns that it keeps
    rows: int  # number that the head has, of which they are the first


def host_of(model: nn.Module) -> PreTrainedModel:
    """Return the model of transformers inside a PEFT model."""
    base: Any = getattr(model, "get_base_model", None)
    host: Any = model if base is None else base()
    if not (hasattr(host, "get_output_embeddings") and hasattr(host, "config")):
        raise TypeError(
            "attach: expected a model of transformers, or a PEFT model of one, got "
            f"{type(host).__name__}; attach before wrapping in DDP, FSDP1 or torch.compile"
        )
    return host


def learns_prompt(model: Any) -> bool:
    """Whether PEFT puts virtual tokens before each row."""
    return getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)


def head_layers(host: PreTrainedModel) -> list[nn.Module]:
    """Return the modules of which the model will run one as its head.

    PEFT's modules_to_save has a copy for each adapter.
    """
    head = host.get_output_embeddings()
    if head is None or host.config.is_encoder_decoder:
        slip = (
            "encoder-decoder models are not supported"
            if host.config.is_encoder_decoder
            else "load the weights with AutoModelForCausalLM"
        )
        raise TypeError(
            f"attach: expected a causal language model, got {type(host).__name__}; {slip}"
        )
    can_generate = getattr(host, "can_generate", None)
    if can_generate is not None and not can_generate():
        raise TypeError(
            f"attach: expected a model that can generate, got {type(host).__name__}, whose logits "
            "are not next-token predictions (a masked language model sees the label itself); load "
            "the weights with AutoModelForCausalLM"
        )
    if "peft" in sys.modules:
        from peft.utils.other import ModulesToSaveWrapper

        if isinstance(head, ModulesToSaveWrapper):
            return [head.original_module, *head.modules_to_save.values()]
    return [head]


@contextlib.contextmanager
def head_as(
    host: PreTrainedModel, function: HeadFunction, after: Callable[..., None] | None = None
) -> Iterator[None]:
    """Context in which the head's forward is `function(layer, hidden)`.

    The head's hooks are called as usual, and `after` as the last of them.
    """
    changed, handles = [], []
    if torch.compiler.is_compiling():  # a graph cannot add a hook
        function, after = functools.partial(_then, function, after), None
    for layer in head_layers(host):
        # accelerate calls its hooks inside the forward
        name = "_old_forward" if hasattr(layer, "_hf_hook") else "forward"
        changed.append((vars(layer), name, vars(layer).get(name)))
        vars(layer)[name] = functools.partial(function, layer)
        if after is not None:
            handles.append(layer.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for attributes, name, before in changed:
            del attributes[name]
            if before is not None:
                attributes[name] = before


def _then(
    function: HeadFunction, after: Callable[..., None] | None, layer: nn.Module, hidden: Tensor
) -> Tensor:
    out = function(layer, hidden)
    if after is not None:
        after(layer, (hidden,), out)
    return out


def head_weights(
    layer: nn.Module, hidden: Tensor, transform: Transform
) -> dict[str, Tensor | None]:
    """Return what multiplies the hidden states, by the argument names of the losses."""
    vocabulary = transform.vocabulary
    adapters: dict[str, Tensor] = {}
    if hasattr(layer, "base_layer"):
        adapters = _lora(layer, hidden, vocabulary)
    linear = linear_of(layer)
    weight, bias = linear.weight, linear.bias
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        raise TypeError(
            "attach: the head's weight must be a plain floating-point tensor, got "
            f"{type(weight).__name__}, {weight.dtype}"
        )
    if weight.shape[0] != transform.rows:  # whole here, if ZeRO or FSDP shard it elsewhere
        raise ValueError(
            f"attach: the head must keep its {transform.rows} rows, got {weight.shape[0]}; call "
            "attach(model) again after resize_token_embeddings"
        )
    if vocabulary == weight.shape[0]:
        return {"weight": weight, "bias": bias, **adapters}
    return {
        "weight": weight[:vocabulary],
        "bias": None if bias is None else bias[:vocabulary],
        **adapters,
    }


def linear_of(layer: nn.Module) -> nn.Linear:
    """The linear layer that a head is, or that its adapters are on."""
    layer = getattr(layer, "base_layer", layer)
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise TypeError(
            "attach: the head must be torch.nn.Linear, got "
            f"{type(layer).__module__}.{type(layer).__name__}"
        )
    return layer


def _lora(layer: nn.Module, hidden: Tensor, vocabulary: int) -> dict[str, Tensor]:
    """LoRA on the head, logits += lora_hidden lora_weight^T; several adapters are concatenated."""
    from peft.tuners.lora import Linear as LoraLinear

    if type(layer) is not LoraLinear:
        raise TypeError(
            "attach: of PEFT's layers, the head may be only LoRA's Linear, got "
            f"{type(layer).__module__}.{type(layer).__name__}"
        )
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    if layer.disable_adapters or layer.merged:
        return {}
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in names:
        if name in layer.lora_variant or layer.lora_bias.get(name, False):
            what = (
                type(layer.lora_variant[name]).__name__
                if name in layer.lora_variant
                else "lora_bias"
            )
            raise TypeError(
                f"attach: plain LoRA is supported on the head, but adapter {name!r} has {what}"
            )
    if not names:
        return {}
    inner = []
    for name in names:
        down, dropout = cast(nn.Linear, layer.lora_A[name]), layer.lora_dropout[name]
        inner.append(layer.scaling[name] * down(dropout(hidden.to(down.weight.dtype))))
    outer = [cast(nn.Linear, layer.lora_B[name]).weight for name in names]
    return {"lora_hidden": torch.cat(inner, -1), "lora_weight": torch.cat(outer, 1)[:vocabulary]}


def ordinary_tokens(host: PreTrainedModel, count: int) -> Tensor:
    """Return token ids `[1, count]` from the whole vocabulary, except images and end tokens."""
    config = host.config.get_text_config()
    named = {**host.config.to_dict(), **config.to_dict()}
    special = [x for name, x in named.items() if name.endswith(("_token_id", "_token_index"))]
    special_ids = {i for x in special for i in (x if isinstance(x, list) else [x])}
    ordinary = [i for i in range(config.vocab_size) if i not in special_ids]
    ids = ordinary[:: max(1, len(ordinary) // count)][:count]
    embeddings = cast(nn.Embedding, host.get_input_embeddings())
    if embeddings.weight.is_meta:
        raise ValueError(
            f"attach: the weights of {type(host).__name__} must be on a device, got the meta "
            "device; load them first"
        )
    return torch.tensor([ids], device=embeddings.weight.device)


def measure_transform(host: PreTrainedModel, logits_of: Callable[[], Tensor]) -> Transform:
    """Measure the scale and soft cap that the model applies to its head's output.

    The model is run by `logits_of()`, with numbers in place of the head's output, however it writes
    scale and cap.
    """
    numbers = torch.tensor([2.0**-40, 2.0**40, 1.0, -3.0, 50.0, -7.5, 0.0], dtype=torch.float64)
    repeated = lambda length: numbers.repeat(-(-length // len(numbers)))[:length]
    with head_as(
        host,
        lambda layer, hidden: (
            repeated(layer.out_features).to(hidden.device).repeat(*hidden.shape[:-1], 1)
        ),
    ):
        z = logits_of()[0, 0].double().cpu()
    x = repeated(len(z))
    scale, far = z[0] / x[0], z[1]  # tanh(x) is x near 0, and 1 far from it
    softcap = None if torch.isclose(far, scale * x[1], rtol=1e-5) else far
    expected = scale * x if softcap is None else softcap * torch.tanh(scale * x / softcap)
    for number, got, wanted in zip(x.tolist(), z.tolist(), expected.tolist()):
        if not abs(got - wanted) <= 1e-5 * abs(wanted):
            raise ValueError(
                f"attach: {type(host).__name__} must only scale and cap the logits of its head; of "
                f"{number:.6g} expected {wanted:.6g}, as its other logits are scaled and capped, "
                f"got {got:.6g}"
            )
    return Transform(
        scale.float().item(),
        None if softcap is None else softcap.float().item(),
        len(z),
        linear_of(head_layers(host)[0]).out_features,
    )
