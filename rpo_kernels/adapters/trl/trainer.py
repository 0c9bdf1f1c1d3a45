"""TRL's DPO trainer for every RPO objective."""

from __future__ import annotations

import contextlib
import functools
import textwrap
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import get_config_model_id, global_then_local_main_first, use_adapter

from rpo_kernels import RPOOutput, sequence_logps, shift_labels
from rpo_kernels.sums import Objective

from ..transformers import attach
from ..transformers.head import learns_prompt
from .checks import check_dataset, check_packing, check_reference, objective_of
from .config import RPOConfig
from .contract import changed_calls, changed_methods, refusal
from .data import CALLS as READING_CALLS
from .data import COLUMNS, DataCollatorForGroups, encode
from .metrics import group_metrics, token_metrics
from .patch import RowStatistics, accelerate_trl

NOT_FOR_THE_MODEL = (
    "group_sizes",
    "cu_groups",
    "cu_seqlens",
    "completion_mask",
    "rewards",
    "ref_logps",
    "group_weights",
)

# What the trainer needs of TRL: functions that it calls, with how many positional arguments and
# which keywords; methods that TRL calls; attributes that TRL sets.
CALLS = READING_CALLS | {
    DPOTrainer.__init__: (
        6,
        (
            "eval_dataset",
            "processing_class",
            "compute_metrics",
            "callbacks",
            "optimizers",
            "quantization_config",
            "peft_config",
        ),
    ),
    disable_gradient_checkpointing: (2, ()),
    get_config_model_id: (1, ()),
    global_then_local_main_first: (0, ()),
    use_adapter: (1, ("adapter_name",)),
}
METHODS = (
    "_prepare_dataset",
    "_set_signature_columns_if_needed",
    "_precompute_ref_logps",
    "compute_ref_log_probs",
    "_compute_loss",
)
ATTRIBUTES = (
    "_metrics",
    "_tokenizer",
    "_total_train_tokens",
    "_tp_size",
    "aux_loss_enabled",
    "ref_model",
    "router_aux_loss_coef",
)


class RPOTrainer(DPOTrainer):
    """`trl.DPOTrainer` for any `RPOObjective`: explicit rewards, K >= 2 responses per prompt.

        L = mean over prompts of D[s || t],   s_i = beta (l_i - lref_i),   t_i = eta r*_i

    Source: arXiv 2502.00203. The policy's loss is `linear_rpo_loss` inside the model's forward: 3
    GEMMs with a trainable head, 2 with a frozen one, metrics included. Everything else is TRL's:
    models and references (a copy, `ref_model`, precomputed, a PEFT model with its adapter
    disabled), evaluation, accumulation, distribution, checkpoints. Other arguments are those of
    `trl.DPOTrainer`.

    Metrics are TRL's, for the responses with the largest target (`chosen`) and the smallest
    (`rejected`; the last of equal ones), in the objective's reward units. In addition:
    `rewards/target_margin`, t_chosen - t_rejected; `rewards/agreement`, the share of response pairs
    with different targets that the implicit rewards order alike; `kl`, the mean of l_i - lref_i in
    nats, which estimates KL(policy || reference) if the policy generated the responses. Those of a
    sum of objectives are of its first part (`rewards/target_margin`: of the first that uses
    rewards), and `NAME/loss`, `NAME/rewards/...` of each part.

    Args:
        model: as for `trl.DPOTrainer`.
        ref_model: as for `trl.DPOTrainer`; not loaded for objectives without a reference.
        args: `RPOConfig`. `per_device_train_batch_size` counts prompts.
        data_collator: makes the tensors of `DataCollatorForGroups`, which is the default.
        train_dataset: columns `prompt, responses, rewards` (K texts, or K lists of messages, and K
            numbers; K may differ between prompts), or TRL's pairs `prompt, chosen, rejected` with
            `score_chosen, score_rejected` or `chosen_reward, rejected_reward`. Objectives with a
            fixed target need no rewards; the first response (with rewards: the best) is then the
            chosen one. A column `group_weight` holds a finite factor on the loss of each row; the
            mean is still one over the number of rows. Likewise eval_dataset.
        peft_config: as for `trl.DPOTrainer`.

    Raises:
        ValueError, TypeError: at construction, for data that do not fit the objective (a
            `datasets.IterableDataset` shows its first row then, the others as they come),
            for an objective with several references, and for images; with `padding_free`, for a
            model that mixes the sequences of a row, and where logits are asked for
            (`compute_metrics`, `predict`).
        RuntimeError: where the installed TRL is not what the trainer was written for; the message
            names what changed.
    """

    objective: Objective
    model: Any  # of transformers, or a PEFT model of one
    _most_responses = 0  # the largest K of a dataset whose reference is being precomputed

    _tag_names = ["trl", "rpo"]  # noqa: RUF012 (as in the base class)
    _name = "RPO"
    _paper = {  # noqa: RUF012
        "title": "Reward-aware Preference Optimization: A Unified Mathematical Framework for "
        "Model Alignment",
        "id": "2502.00203",
        "citation": textwrap.dedent("""\
            @article{sun2025reward,
                title  = {{Reward-aware Preference Optimization: A Unified Mathematical Framework
                          for Model Alignment}},
                author = {Shengyang Sun and others},
                year   = 2025,
                eprint = {arXiv:2502.00203},
            }"""),
    }

    def __init__(
        self,
        model: Any,
        ref_model: PreTrainedModel | None = None,
        args: RPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        **options: Any,
    ):
        for name in ("objective", "beta"):
            if name in options:
                raise TypeError(
                    f"RPOTrainer: `{name}` must be in `args`, got it as an argument; pass "
                    f"args=RPOConfig({name}=...)"
                )
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = RPOConfig(f"{name.split('/')[-1]}-RPO")
        changes = changed_calls(CALLS) + changed_methods(RPOTrainer, DPOTrainer, METHODS)
        if changes:
            raise refusal("RPOTrainer", changes)
        self.objective = objective_of(args)
        check_dataset(train_dataset)
        check_reference(model, ref_model, args, self.objective.reference, peft_config)
        # The base class loads no reference where log-probabilities are precomputed: here there are
        # none to compute.
        precompute = args.precompute_ref_log_probs
        args.precompute_ref_log_probs |= self.objective.reference == "none"
        # The base class warns that it has none, and switches it off.
        self.packs, args.padding_free = args.padding_free, False
        self._is_unchecked = self.packs
        try:
            super().__init__(
                model,
                ref_model,
                args,
                data_collator,
                train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                **options,
            )
        finally:
            args.precompute_ref_log_probs = precompute
            args.padding_free = self.packs
        if missing := [name for name in ATTRIBUTES if not hasattr(self, name)]:
            raise refusal("RPOTrainer", [f"DPOTrainer sets no `{name}`" for name in missing])
        self.precompute_ref_logps = precompute
        if self.packs and self.compute_metrics is not None:
            raise ValueError(
                "RPOTrainer: `compute_metrics` gets the logits of padded rows; leave out "
                "`padding_free`"
            )
        # ZeRO-3 shards parameters before it knows how to gather them for a forward
        self._is_attached = False
        if not is_deepspeed_zero3_enabled():
            self._attach()

    def _attach(self) -> None:
        """Make the policy one that returns losses, and run it on a few tokens to see that it does
        so.
        """
        if self.packs:
            check_packing(self.model, self.accelerator)
            if self.ref_model is not None:
                check_packing(self.ref_model, self.accelerator)
        host: Any = attach(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        if self.aux_loss_enabled:  # the model's forward adds it, with its own coefficient
            host.router_aux_loss_coef = self.router_aux_loss_coef
        self._is_attached = True

    # the base class makes its collator of pairs with the tokenizer's padding; ours takes over its
    # options
    @property
    def data_collator(self) -> Any:
        """The collator: `DataCollatorForGroups`, or the caller's, which makes the same tensors."""
        return self._data_collator

    @data_collator.setter
    def data_collator(self, collator: Any) -> None:
        self._data_collator = (
            DataCollatorForGroups(**vars(collator), padding_free=self.packs)
            if type(collator) is DataCollatorForPreference
            else collator
        )

    # ---- data ------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str
    ) -> Any:
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"RPOTrainer: {dataset_name} dataset must have rows, got none")
        if "response_ids" in first:
            return dataset
        translate = functools.partial(
            encode,
            processing_class=processing_class,
            eos_token=self._tokenizer.eos_token,
            objective=self.objective,
            name=dataset_name,
        )
        translate(first)  # an iterable dataset would raise at the first step only
        options: dict[str, Any] = {}
        if isinstance(dataset, Dataset):
            options = {
                "num_proc": args.dataset_num_proc,
                "desc": f"Tokenizing {dataset_name} dataset",
            }
        with global_then_local_main_first():
            dataset = dataset.map(translate, remove_columns=list(first), **options)
            if args.max_length is not None and args.truncation_mode == "keep_start":
                # these would have no response tokens left
                options.pop("desc", None)
                dataset = dataset.filter(
                    lambda example: len(example["prompt_ids"]) < args.max_length, **options
                )
                if isinstance(dataset, Dataset) and not len(dataset):
                    raise ValueError(
                        f"RPOTrainer: {dataset_name} dataset must have prompts shorter than "
                        f"`max_length` {args.max_length}, got none; set it larger in args"
                    )
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = COLUMNS  # type: ignore[assignment]  # None there

    # ---- log-probabilities -----------------------------------------------------------------------

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if self.objective.reference == "none":
            return dataset
        if isinstance(dataset, Dataset):
            self._most_responses = max(map(len, dataset["response_ids"]))
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The reference's log-probabilities of the first responses `[G]`, and of the others `[G,
        K - 1]`, K the largest of the batch, or of the dataset that it is from while that one is
        precomputed; 0 where a prompt has fewer."""
        if self._is_unchecked:  # before the results reach a cache
            check_packing(model, self.accelerator)
            self._is_unchecked = False
        token_logps, sizes = self._reference_logps(model, inputs), inputs["group_sizes"]
        logps = sequence_logps(token_logps, cu_seqlens=inputs.get("cu_seqlens"))
        K = max(self._most_responses, int(sizes.max()))
        exists = torch.arange(K, device=sizes.device) < sizes[:, None]
        table = logps.new_zeros(exists.shape).masked_scatter(exists, logps)
        return table[:, 0], table[:, 1:]

    @torch.no_grad()
    def _reference_logps(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Per token `[S, T]` or `[N]`, of the reference model or of the policy without its
        adapter.
        """
        adapter: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            policy = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(
                policy, adapter_name="ref" if "ref" in policy.peft_config else None
            )
        kwargs, labels = _model_inputs(inputs)
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        with (
            disable_gradient_checkpointing(self.model, checkpointing),
            adapter,
            self.accelerator.autocast(),
            accelerate_trl(),
        ):
            if (cu_seqlens := kwargs.pop("cu_seqlens", None)) is not None:
                shifted = shift_labels(labels[0], labels[0] != -100, cu_seqlens=cu_seqlens)
                return model(**kwargs, shift_labels=shifted[None], fused_lm_head=True).log_probs[0]
            logps = model(**kwargs, labels=labels, fused_lm_head=True).log_probs
        # [S, T - 1], or more where prompt tuning puts virtual tokens first
        return torch.nn.functional.pad(logps[:, 1 - labels.shape[1] :], (0, 1))

    # ---- the loss --------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        if return_outputs and self.packs:
            raise ValueError(
                "RPOTrainer: `padding_free` must be False for predict, which returns the logits of "
                "padded rows; got True; make the trainer without it"
            )
        if not self._is_attached:
            self._attach()
        ref_logps = ref_token_logps = None
        if self.precompute_ref_logps:
            ref_logps = inputs["ref_logps"]
        elif self.objective.reference == "single":
            ref_token_logps = self._reference_logps(
                self.model if self.ref_model is None else self.ref_model, inputs
            )
            ref_logps = sequence_logps(ref_token_logps, cu_seqlens=inputs.get("cu_seqlens"))
            if learns_prompt(self.model):  # the policy's rows are longer, by virtual tokens
                ref_token_logps = None
        kwargs, labels = _model_inputs(inputs)
        text_config = self.model.config.get_text_config()
        # False where the config asks for an auxiliary loss that router_aux_loss_coef=0 disables
        if self.aux_loss_enabled or getattr(text_config, "output_router_logits", False):
            kwargs["output_router_logits"] = self.aux_loss_enabled
        groups: dict[str, Any] = {
            "rewards": inputs.get("rewards"),
            "cu_groups": inputs.get("cu_groups"),
            "group_weights": inputs.get("group_weights"),
        }
        if "cu_groups" not in inputs:
            S = len(inputs["cu_seqlens"]) - 1 if "cu_seqlens" in inputs else len(labels)
            groups["group_size"] = S // len(inputs["group_sizes"])
        statistics = RowStatistics({"entropy", "mean_logits", "is_top1"})
        out = model(
            **kwargs,
            labels=labels,
            objective=self.objective,
            ref_logps=ref_logps if ref_token_logps is None else ref_token_logps,
            on_logits=statistics,
            **groups,
        )
        self._record(out, statistics, ref_logps, inputs)
        if not return_outputs:
            return out.loss
        kwargs.pop("cu_seqlens", None)
        with torch.no_grad():  # for compute_metrics, which wants logits
            return out.loss, model(**kwargs)

    @torch.no_grad()
    def _record(
        self,
        out: RPOOutput,
        statistics: RowStatistics,
        ref_logps: Tensor | None,
        inputs: dict,
    ) -> None:
        """Add this batch, of all processes, to the metrics that are logged next."""
        mode = "train" if self.model.training else "eval"
        sizes, ragged = inputs["group_sizes"], "cu_groups" in inputs
        metrics, chosen, rejected = group_metrics(out, sizes, ragged)
        if not self.objective.parts[0].uses_rewards:
            del metrics["rewards/target_margin"]  # a constant
        for (name, part), objective in zip((out.parts or {}).items(), self.objective.parts):
            of_part, *_ = group_metrics(part, sizes, ragged)
            metrics[f"{name}/loss"] = part.loss, torch.ones_like(part.loss)
            keys = ["rewards/chosen", "rewards/rejected", "rewards/margins"]
            if objective.uses_rewards:
                keys.append("rewards/target_margin")
                metrics.setdefault("rewards/target_margin", of_part["rewards/target_margin"])
            metrics |= {f"{name}/{key}": of_part[key] for key in keys}
        if ref_logps is not None:
            metrics["kl"] = (out.logps - ref_logps).sum(), ref_logps.new_tensor(len(ref_logps))
        lengths: Any = out.lengths  # which hidden states always bring
        metrics |= token_metrics(statistics, lengths, chosen, rejected)
        if self.aux_loss_enabled and out.aux_loss is not None:
            metrics["aux_loss"] = (
                out.aux_loss / self.router_aux_loss_coef,
                torch.ones_like(out.aux_loss),
            )
        tokens = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum()
        metrics["num_tokens"] = tokens, out.loss.new_tensor(1)
        # One gathering, one synchronisation: sums and counts over processes, which may hold
        # different numbers of responses.
        # [metrics, 2]
        sums = torch.stack([torch.stack([x.double() for x in pair]) for pair in metrics.values()])
        recorded = dict(zip(metrics, self.accelerator.gather(sums[None]).sum(0).tolist()))
        total_tokens = recorded.pop("num_tokens")[0]
        if mode == "train":
            self._total_train_tokens += int(total_tokens) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        for name, (total, count) in recorded.items():
            if count:
                self._metrics[mode][name].append(total / count)


def _model_inputs(inputs: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
    """What the model takes, and labels `[S, T]` or `[1, N]`, not shifted: responses' tokens.

    `cu_seqlens`, of packed sequences, is for attached models.
    """
    kwargs = {name: x for name, x in inputs.items() if name not in NOT_FOR_THE_MODEL}
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    # nothing predicts a first token, also where prompt tuning puts tokens before it
    if "cu_seqlens" in inputs:
        kwargs["cu_seqlens"] = inputs["cu_seqlens"]
        labels[:, inputs["cu_seqlens"][:-1].long()] = -100
    else:
        labels[:, 0] = -100
    return kwargs | {"use_cache": False}, labels
