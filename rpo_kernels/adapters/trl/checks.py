"""What `RPOTrainer` refuses when it is made."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel
from trl.trainer.utils import get_config_model_id

from rpo_kernels.sums import Objective

from ..transformers.head import host_of, learns_prompt, ordinary_tokens
from .config import RPOConfig


def objective_of(args: object) -> Objective:
    """The arguments' objective, if the trainer can hold its reference."""
    if not isinstance(args, RPOConfig):
        raise TypeError(
            "RPOTrainer: `args` must be an RPOConfig(objective=...), which says the loss; got "
            f"{type(args).__name__}"
        )
    objective = args.make_objective()
    if objective.reference in ("harmonic", "geometric"):
        raise ValueError(
            "RPOTrainer: `objective` must have one reference or none, because TRL holds one "
            f"reference model; got reference={objective.reference!r}"
        )
    return objective


def check_dataset(dataset: Any) -> None:
    """One dataset, of text only: images would need a collator of their own."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        hint = "; pass one of its splits" if isinstance(dataset, dict) else ""
        raise TypeError(
            "RPOTrainer: `train_dataset` must be a Dataset or an IterableDataset; got "
            f"{type(dataset).__name__}{hint}"
        )
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("RPOTrainer: train dataset must have rows, got none")
    images = {"image", "images"} & first.keys()
    if images:
        raise ValueError(
            f"RPOTrainer: train dataset must be text only, got a column `{images.pop()}`; for a "
            "vision-language model write your own loop with rpo_kernels.adapters.transformers"
        )


def check_reference(
    model: Any,
    ref_model: PreTrainedModel | None,
    args: RPOConfig,
    reference: str,
    peft_config: Any,
) -> None:
    """What the base class would find out while it loads a model, or at step 1."""
    if reference == "none":
        for name, given in (
            ("ref_model", ref_model is not None),
            ("precompute_ref_log_probs", args.precompute_ref_log_probs),
            ("sync_ref_model", args.sync_ref_model),
        ):
            if given:
                raise ValueError(
                    f"RPOTrainer: `{name}` must be left out for an objective without a reference"
                )
        return
    in_memory = not isinstance(model, str) and not get_config_model_id(model.config)
    peft = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
    if in_memory and ref_model is None and not peft and not args.precompute_ref_log_probs:
        raise ValueError(
            "RPOTrainer: `ref_model` must be a model, got None: TRL cannot load the reference of a "
            "model that was built in memory; pass copy.deepcopy(model) as ref_model, or "
            "peft_config, or precompute_ref_log_probs=True in args"
        )


@torch.no_grad()
def check_packing(model: Any, accelerator: Accelerator) -> None:
    """Whether a model keeps sequences in one row apart: the second one's logits may not depend on
    the first.
    """
    inner = accelerator.unwrap_model(model)
    if learns_prompt(inner):
        raise ValueError(
            "RPOTrainer: `padding_free` and prompt learning do not go together: PEFT puts virtual "
            "tokens before a row, not before each sequence in it"
        )
    host = host_of(inner)
    ids = ordinary_tokens(host, 8).to(accelerator.device)
    positions = torch.arange(ids.shape[1], device=ids.device).repeat(2)[None]
    is_training = model.training
    model.eval()
    second, other = (
        model(input_ids=torch.cat([first, ids], 1), position_ids=positions, use_cache=False).logits[
            0, ids.shape[1] :
        ]
        for first in (ids, ids.flip(1))
    )
    model.train(is_training)
    change = (second - other).abs().max()
    # not 0: with other tokens beside them, a mixture of experts may round its own differently
    if not change <= 2 * torch.finfo(second.dtype).eps * second.abs().max():
        raise ValueError(
            "RPOTrainer: `padding_free` needs a model that keeps the sequences of a row apart by "
            f"their position_ids; in {type(host).__name__} the first one changes the logits of the "
            f"second by {change:.3g}"
        )
