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
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import get_config_model_id, global_then_local_main_first, use_adapter

from rpo_kernels import RPOObjective, RPOOutput, preference_loss, sequence_logps

from ..transformers import attach
from .config import RPOConfig
from .data import COLUMNS, DataCollatorForGroups, encode
from .metrics import group_metrics, token_metrics
from .patch import RowStatistics, accelerate_trl

NOT_FOR_THE_MODEL = ("group_sizes", "cu_groups", "completion_mask", "rewards", "ref_logps")


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
    nats, which estimates KL(policy || reference) if the policy generated the responses.

    Args:
        model: as for `trl.DPOTrainer`.
        ref_model: as for `trl.DPOTrainer`; not loaded for objectives without a reference.
        args: `RPOConfig`. `per_device_train_batch_size` counts prompts.
        data_collator: makes the tensors of `DataCollatorForGroups`, which is the default.
        train_dataset: columns `prompt, responses, rewards` (K texts, or K lists of messages, and K
            numbers; K may differ between prompts), or TRL's pairs `prompt, chosen, rejected` with
            `score_chosen, score_rejected` or `chosen_reward, rejected_reward`. Objectives with a
            fixed target need no rewards; the first response (with rewards: the best) is then the
            chosen one. Likewise eval_dataset.
        peft_config: as for `trl.DPOTrainer`.

    Raises:
        ValueError, TypeError: at construction, if the data do not fit the objective (of a
            `datasets.IterableDataset` only the first row is checked then, the others as they come),
            for an objective with several references, and for images.
    """

    objective: RPOObjective
    model: Any  # of transformers, or a PEFT model of one

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
        *rest: Any,
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
        self.objective = _objective_of(args)
        _check_text_only(train_dataset)
        _check_reference(model, ref_model, args, self.objective.reference, peft_config)
        # The base class loads no reference model if log-probabilities are precomputed; without a
        # reference there are none to compute.
        precompute = args.precompute_ref_log_probs
        args.precompute_ref_log_probs |= self.objective.reference == "none"
        try:
            super().__init__(  # type: ignore[misc]  # none of `rest` is peft_config
                model,
                ref_model,
                args,
                data_collator,
                train_dataset,
                *rest,
                peft_config=peft_config,
                **options,
            )
        finally:
            args.precompute_ref_log_probs = precompute
        self.precompute_ref_logps = precompute
        host: Any = attach(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        if self.aux_loss_enabled:  # the model's forward adds it, with its own coefficient
            host.router_aux_loss_coef = self.router_aux_loss_coef

    # the base class makes its collator of pairs with the tokenizer's padding; ours takes over its
    # options
    @property
    def data_collator(self) -> Any:
        """The collator: `DataCollatorForGroups`, or the caller's, which makes the same tensors."""
        return self._data_collator

    @data_collator.setter
    def data_collator(self, collator: Any) -> None:
        self._data_collator = (
            DataCollatorForGroups(**vars(collator))
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
        """Return the reference's log-probabilities of first responses `[G]`, others `[G, K - 1]`.

        K is the dataset's largest; 0 where a prompt has fewer.
        """
        logps, sizes = sequence_logps(self._reference_logps(model, inputs)), inputs["group_sizes"]
        exists = torch.arange(self._most_responses, device=sizes.device) < sizes[:, None]
        table = logps.new_zeros(exists.shape).masked_scatter(exists, logps)
        return table[:, 0], table[:, 1:]

    @torch.no_grad()
    def _reference_logps(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Per token `[S, T]`, from the reference model, or from the policy without its adapter."""
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
            logps = model(**kwargs, labels=labels, fused_lm_head=True).log_probs
        # [S, T - 1], or more where prompt tuning puts virtual tokens first
        return torch.nn.functional.pad(logps[:, 1 - labels.shape[1] :], (0, 1))

    # ---- the loss --------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        ref_logps = None
        if self.precompute_ref_logps:
            ref_logps = inputs["ref_logps"]
        elif self.objective.reference == "single":
            ref_logps = self._reference_logps(
                self.model if self.ref_model is None else self.ref_model, inputs
            )
            if getattr(
                getattr(self.model, "active_peft_config", None), "is_prompt_learning", False
            ):
                # virtual tokens make the policy's rows longer
                ref_logps = sequence_logps(ref_logps)
        kwargs, labels = _model_inputs(inputs)
        if self.aux_loss_enabled:
            kwargs["output_router_logits"] = True
        groups: dict[str, Any] = {
            "rewards": inputs.get("rewards"),
            "cu_groups": inputs.get("cu_groups"),
        }
        groups["group_size"] = (
            None if "cu_groups" in inputs else len(labels) // len(inputs["group_sizes"])
        )
        statistics = RowStatistics({"entropy", "mean_logits", "is_top1"})
        out = model(
            **kwargs,
            labels=labels,
            objective=self.objective,
            ref_logps=ref_logps,
            on_logits=statistics,
            **groups,
        )
        self._record(out, statistics, ref_logps, inputs, groups)
        if not return_outputs:
            return out.loss
        with torch.no_grad():  # compute_metrics needs logits
            return out.loss, model(**kwargs)

    @torch.no_grad()
    def _record(
        self,
        out: RPOOutput,
        statistics: RowStatistics,
        ref_logps: Tensor | None,
        inputs: dict,
        groups: dict,
    ) -> None:
        """Add this batch, of all processes, to the metrics that are logged next."""
        mode = "train" if self.model.training else "eval"
        metrics, chosen, rejected = group_metrics(out, inputs["group_sizes"], "cu_groups" in inputs)
        if not self.objective.uses_rewards:
            del metrics["rewards/target_margin"]  # a constant
        if ref_logps is not None:
            ref_logps = ref_logps if ref_logps.dim() == 1 else sequence_logps(ref_logps)
            metrics["kl"] = (out.logps - ref_logps).sum(), ref_logps.new_tensor(len(ref_logps))
        metrics |= token_metrics(
            statistics, inputs["completion_mask"][:, 1:].bool(), chosen, rejected
        )
        if self.aux_loss_enabled:
            rewards = groups.pop("rewards")
            without = preference_loss(
                out.logps,
                rewards,
                self.objective,
                ref_logps=ref_logps,
                lengths=out.lengths,
                **groups,
            ).loss
            metrics["aux_loss"] = (
                (out.loss - without) / self.router_aux_loss_coef,
                torch.ones_like(without),
            )
        metrics["num_tokens"] = inputs["attention_mask"].sum(), out.loss.new_tensor(1)
        # [metrics, 2]: one gather and one synchronisation, for sums and counts over processes,
        # which may hold different numbers of responses
        sums = torch.stack([torch.stack([x.double() for x in pair]) for pair in metrics.values()])
        recorded = dict(zip(metrics, self.accelerator.gather(sums[None]).sum(0).tolist()))
        tokens = recorded.pop("num_tokens")[0]
        if mode == "train":
            self._total_train_tokens += int(tokens) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        for name, (total, count) in recorded.items():
            if count:
                self._metrics[mode][name].append(total / count)


def _model_inputs(inputs: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
    """Return the model's inputs, and labels `[S, T]`: the responses' tokens, not shifted."""
    kwargs = {name: x for name, x in inputs.items() if name not in NOT_FOR_THE_MODEL}
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    labels[:, 0] = -100  # nothing predicts it, even if prompt tuning puts tokens before it
    return kwargs | {"use_cache": False}, labels


def _objective_of(args: object) -> RPOObjective:
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


def _check_text_only(dataset: Any) -> None:
    first = {} if dataset is None else next(iter(dataset), None)
    if first is None:
        raise ValueError("RPOTrainer: train dataset must have rows, got none")
    images = {"image", "images"} & first.keys()
    if images:
        raise ValueError(
            f"RPOTrainer: train dataset must be text only, got a column `{images.pop()}`; for a "
            "vision-language model write your own loop with rpo_kernels.adapters.transformers"
        )


def _check_reference(
    model: Any,
    ref_model: PreTrainedModel | None,
    args: RPOConfig,
    reference: str,
    peft_config: Any,
) -> None:
    """Raise for what the base class would find while loading a model, or at step 1."""
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
