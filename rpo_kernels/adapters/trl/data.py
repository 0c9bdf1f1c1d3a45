"""Preference data for `RPOTrainer`: groups of K >= 2 responses per prompt, with rewards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging
from trl.data_utils import _tokenize, common_prefix_length, extract_prompt, is_conversational
from trl.trainer.dpo_trainer import DataCollatorForPreference

from rpo_kernels.sums import Objective

logger = logging.get_logger(__name__)

COLUMNS = [
    "prompt_ids",
    "response_ids",
    "rewards",
    "group_weight",
    "ref_chosen_logps",
    "ref_rejected_logps",
]
SCORES = (("score_chosen", "score_rejected"), ("chosen_reward", "rejected_reward"))
EXPECTED = (
    "prompt, responses, rewards; or (prompt,) chosen, rejected with score_chosen, score_rejected "
    "or chosen_reward, rejected_reward"
)

# How TRL's functions are called here, and by DataCollatorForGroups its base class: positional
# arguments and keywords.
CALLS: dict[Callable, tuple[int, tuple[str, ...]]] = {
    _tokenize: (2, ("add_generation_prompt", "tools")),
    common_prefix_length: (2, ()),
    extract_prompt: (1, ()),
    is_conversational: (1, ()),
    DataCollatorForPreference: (
        0,
        ("pad_token_id", "max_length", "truncation_mode", "pad_to_multiple_of", "return_tensors"),
    ),
}


def group_of(
    example: dict[str, Any], objective: Objective, name: str
) -> tuple[Any, list, list[float] | None]:
    """Return (prompt, responses, rewards) of a row; rewards are None if no part uses them.

    For parts with a fixed target the first response is the chosen one: `chosen`, or the one with
    the largest of `rewards`.
    """
    where = f"RPOTrainer: {name} dataset"
    if {"prompt", "responses"} <= example.keys():
        prompt, responses, rewards = example["prompt"], example["responses"], example.get("rewards")
    elif {"chosen", "rejected"} <= example.keys():
        example = example if "prompt" in example else example | extract_prompt(example)
        prompt, responses = example["prompt"], [example["chosen"], example["rejected"]]
        rewards = next(
            ([example[a], example[b]] for a, b in SCORES if a in example and b in example), None
        )
    else:
        raise ValueError(f"{where} must have the columns {EXPECTED}; got {', '.join(example)}")
    if not isinstance(responses, list) or len(responses) < 2:
        got = f"{len(responses)}" if isinstance(responses, list) else type(responses).__name__
        raise ValueError(
            f"{where}: `responses` must be a list of at least two to each prompt, got {got}; one "
            "row holds all responses to its prompt"
        )
    kind = str if isinstance(prompt, str) else list
    if not all(isinstance(response, kind) for response in responses):
        expected = "texts, as `prompt` is" if kind is str else "lists of messages, as `prompt` is"
        got = ", ".join(sorted({type(response).__name__ for response in responses}))
        raise ValueError(f"{where}: `responses` must be {expected}, got {got}")
    if any(part.label is not None for part in objective.parts) and len(responses) != 2:
        raise ValueError(
            f"{where}: `responses` must be two to each prompt for an objective that labels pairs, "
            f"got {len(responses)}"
        )
    without = rewards is None and not {"responses", "rewards"} <= example.keys()
    if without and objective.uses_rewards:
        raise ValueError(
            f"{where} must have rewards for this objective, in the columns {EXPECTED}; got "
            f"{', '.join(example)}. To train without rewards, choose an objective with its own "
            'target, such as objective="dpo"'
        )
    if rewards is not None or objective.uses_rewards:
        _check_rewards(rewards, len(responses), objective, where)
    fixed_target = not all(part.uses_rewards for part in objective.parts)
    if fixed_target and rewards is not None and "responses" in example:
        best = max(range(len(rewards)), key=rewards.__getitem__)
        responses, rewards = (
            [each[best], *each[:best], *each[best + 1 :]] for each in (responses, rewards)
        )
    if rewards is None or not objective.uses_rewards:
        return prompt, responses, None
    return prompt, responses, [float(r) for r in rewards]


def _check_rewards(rewards: object, K: int, objective: Objective, where: str) -> None:
    if not isinstance(rewards, list) or len(rewards) != K:
        got = len(rewards) if isinstance(rewards, list) else rewards
        raise ValueError(f"{where}: `rewards` must be one number per response, {K}; got {got}")
    infinite = all(part.rules.infinite_targets for part in objective.parts if part.uses_rewards)
    for reward in rewards:
        number = isinstance(reward, (int, float)) and not isinstance(reward, bool)
        if not number or math.isnan(reward) or (math.isinf(reward) and not infinite):
            legal = "numbers" if infinite else "finite numbers"
            raise ValueError(f"{where}: `rewards` must be {legal}, got {reward!r}")


def group_weight_of(example: dict[str, Any], name: str) -> dict[str, float]:
    """Return the column `group_weight` of a row, if it has one."""
    expected = f"RPOTrainer: {name} dataset: `group_weight` must be"
    if "group_weights" in example:
        raise ValueError(
            f"{expected} the column in which a row has its weight; got `group_weights`; rename it"
        )
    if "group_weight" not in example:
        return {}
    weight = example["group_weight"]
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight):
        raise ValueError(f"{expected} a finite number; got {weight!r}")
    return {"group_weight": float(weight)}


def encode(
    example: dict[str, Any],
    processing_class: Any,
    eos_token: str,
    objective: Objective,
    name: str,
) -> dict[str, Any]:
    """Tokenize a row: `prompt_ids`, `response_ids` (K lists), `rewards` (K) if they are used,
    `group_weight` if it has one.

    As in TRL's DPO, responses in plain text end with the end token, and the prompt ends where the
    tokens of prompt and prompt + response first differ.
    """
    prompt, responses, rewards = group_of(example, objective, name)
    tools = example.get("tools")
    options = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(example.get("chat_template_kwargs") or {}),
    }
    if is_conversational({"prompt": prompt}):
        prompt_ids = _tokenize(processing_class, prompt, add_generation_prompt=True, **options)[
            "input_ids"
        ]
        whole = [
            _tokenize(processing_class, prompt + response, **options)["input_ids"]
            for response in responses
        ]
    else:
        prompt_ids = _tokenize(processing_class, prompt)["input_ids"]
        ended = [r if r.endswith(eos_token) else r + eos_token for r in responses]
        whole = [_tokenize(processing_class, prompt + response)["input_ids"] for response in ended]
    start = min(common_prefix_length(prompt_ids, ids) for ids in whole)
    if start < len(prompt_ids):
        logger.warning_once(
            "RPOTrainer: the tokenized prompt is no prefix of prompt + response; the response "
            f"begins where they differ, and {processing_class.decode(prompt_ids[start:])!r} of the "
            "prompt is left out"
        )
    row = {"prompt_ids": prompt_ids[:start], "response_ids": [ids[start:] for ids in whole]}
    row |= {} if rewards is None else {"rewards": rewards}
    return row | group_weight_of(example, name)


@dataclass
class DataCollatorForGroups(DataCollatorForPreference):
    """Collate rows of `encode` to tensors, with the responses to a prompt adjacent.

    `group_sizes` `[G]`; `cu_groups` `[G+1]` int32 where they differ; `input_ids`,
    `attention_mask`, `completion_mask` `[S, T]`, right padded; `rewards`, `ref_logps` `[S]`,
    `group_weights` `[G]` where the rows have them. Options as for TRL's collator of pairs, and:

    padding_free: sequences end to end in one row instead, `input_ids`, `position_ids`,
        `completion_mask` `[1, N]`, with their boundaries `cu_seqlens` `[S+1]` int32.
    """

    padding_free: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        cut = (
            slice(None, self.max_length)
            if self.truncation_mode == "keep_start"
            else slice(-(self.max_length or 0), None)
        )
        ids, completion = [], []
        for example in examples:
            prompt = example["prompt_ids"]
            for response in example["response_ids"]:
                ids.append(torch.tensor((prompt + response)[cut]))
                completion.append(torch.tensor(([0] * len(prompt) + [1] * len(response))[cut]))
        sizes = [len(example["response_ids"]) for example in examples]
        # first, because accelerate and transformers read the batch size from the first tensor
        batch = {"group_sizes": torch.tensor(sizes)}
        if len(set(sizes)) > 1:
            batch["cu_groups"] = _boundaries(batch["group_sizes"])
        if self.padding_free:
            batch["input_ids"] = torch.cat(ids)[None]
            batch["position_ids"] = torch.cat([torch.arange(len(row)) for row in ids])[None]
            batch["completion_mask"] = torch.cat(completion)[None]
            batch["cu_seqlens"] = _boundaries(torch.tensor([len(row) for row in ids]))
        else:
            batch["input_ids"] = self._pad(ids, self.pad_token_id)
            batch["attention_mask"] = self._pad([torch.ones_like(row) for row in ids], 0)
            batch["completion_mask"] = self._pad(completion, 0)
        if "rewards" in examples[0]:
            batch["rewards"] = torch.tensor(
                [r for example in examples for r in example["rewards"]], dtype=torch.float32
            )
        if "group_weight" in examples[0]:
            batch["group_weights"] = torch.tensor(
                [example["group_weight"] for example in examples], dtype=torch.float32
            )
        # of the first response, and of the others, padded to the dataset's largest K
        if "ref_chosen_logps" in examples[0]:
            rows = [
                [e["ref_chosen_logps"], *e["ref_rejected_logps"]][:k]
                for e, k in zip(examples, sizes)
            ]
            batch["ref_logps"] = torch.tensor([x for row in rows for x in row], dtype=torch.float32)
        return batch

    def _pad(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        padded = pad_sequence(rows, batch_first=True, padding_value=value)
        short = -padded.shape[1] % (self.pad_to_multiple_of or 1)
        return torch.nn.functional.pad(padded, (0, short), value=value)


def _boundaries(sizes: torch.Tensor) -> torch.Tensor:
    """`[n]` -> `[n+1]` int32, from 0."""
    return torch.nn.functional.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
