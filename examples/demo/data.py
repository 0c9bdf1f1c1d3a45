"""Groups of responses to a prompt: read from a file, and collated for a model."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rpo_kernels import shift_labels

SCORES = (("chosen_reward", "rejected_reward"), ("score_chosen", "score_rejected"))


class Preferences(NamedTuple):
    """A row of a file.

    Without scores, the chosen response has reward 1 and the rejected one 0.
    """

    prompt: str
    responses: list[str]
    rewards: list[float]
    scored: bool


class Group(NamedTuple):
    """Responses to one prompt, as token ids, and their rewards."""

    prompt: list[int]
    responses: list[list[int]]
    rewards: list[float]


class Batch(NamedTuple):
    """Groups as tensors: S sequences of prompt, response and padding."""

    input_ids: Tensor  # [S, T]
    attention_mask: Tensor  # [S, T]
    labels: Tensor  # [S, T]: the response token that a position predicts, -100 elsewhere
    rewards: Tensor  # [S]
    cu_groups: Tensor  # [G + 1] int32: where each group begins among the S
    # mean over all responses that were sampled for this batch, including those left out
    sampled_reward: float


def read_preferences(path: str | Path) -> list[Preferences]:
    """Read a JSON Lines file.

    Rows are (prompt, chosen, rejected, optional scores) or (prompt, responses, rewards).
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(parse(json.loads(line)))
            except ValueError as error:
                what = f"not JSON: {error}" if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(f"{path}, line {number}: {what}") from None
    return rows


def parse(row: object) -> Preferences:
    keys = row.keys() if isinstance(row, dict) else set()
    if {"prompt", "responses", "rewards"} <= keys:
        responses, rewards = row["responses"], row["rewards"]
    elif {"prompt", "chosen", "rejected"} <= keys:
        responses = [row["chosen"], row["rejected"]]
        rewards = next(([row[a], row[b]] for a, b in SCORES if a in keys and b in keys), [1.0, 0.0])
    else:
        found = f"the keys {', '.join(keys)}" if keys else f"{json.dumps(row)[:60]}"
        raise ValueError(
            f"expected prompt, chosen, rejected, or prompt, responses, rewards; got {found}"
        )
    if not isinstance(responses, list) or len(responses) < 2:
        raise ValueError(
            f"`responses` must be a list of at least two, got {json.dumps(responses)[:60]}"
        )
    for text in (row["prompt"], *responses):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"`prompt` and `responses` must be non-empty strings, got {json.dumps(text)[:60]}"
            )
    if not isinstance(rewards, list) or len(rewards) != len(responses):
        raise ValueError(
            f"`rewards` must be a list of {len(responses)} numbers, one per response, got "
            f"{json.dumps(rewards)[:60]}"
        )
    for reward in rewards:
        if (
            isinstance(reward, bool)
            or not isinstance(reward, (int, float))
            or not math.isfinite(reward)
        ):
            raise ValueError(f"`rewards` must be finite numbers, got {json.dumps(reward)}")
    scored = "rewards" in keys or any(a in keys and b in keys for a, b in SCORES)
    return Preferences(row["prompt"], responses, rewards, scored)


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """Tokenize a prompt with the chat template, up to where the response begins."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt + "\n\n").input_ids
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def encode(tokenizer, row: Preferences, max_tokens: int) -> Group:
    """Tokenize a row; responses end with the end token, and are cut after max_tokens."""
    texts = tokenizer(row.responses, add_special_tokens=False).input_ids
    responses = [[*ids, tokenizer.eos_token_id][:max_tokens] for ids in texts]
    return Group(prompt_ids(tokenizer, row.prompt), responses, row.rewards)


def best_first(group: Group) -> Group:
    """Return the best response, followed by those with a smaller reward.

    Objectives without rewards can learn from these.
    """
    order = sorted(range(len(group.rewards)), key=lambda i: -group.rewards[i])
    keep = [i for i in order if i == order[0] or group.rewards[i] < group.rewards[order[0]]]
    return Group(group.prompt, [group.responses[i] for i in keep], [group.rewards[i] for i in keep])


def collate(
    groups: list[Group], device: torch.device | str, sampled_reward: float = math.nan
) -> Batch:
    """Collate with right padding, which does not affect a response."""
    pairs = [(group.prompt, response) for group in groups for response in group.responses]
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    input_ids, attention_mask, scored = torch.zeros(3, len(pairs), width, dtype=torch.long)
    for i, (prompt, response) in enumerate(pairs):
        length = len(prompt) + len(response)
        input_ids[i, :length] = torch.tensor(prompt + response)
        attention_mask[i, :length] = 1
        scored[i, len(prompt) : length] = 1
    rewards = torch.tensor(
        [reward for group in groups for reward in group.rewards], dtype=torch.float32
    )
    ends = itertools.accumulate(len(group.responses) for group in groups)
    cu_groups = torch.tensor([0, *ends], dtype=torch.int32)
    tensors = input_ids, attention_mask, shift_labels(input_ids, scored), rewards, cu_groups
    return Batch(*(tensor.to(device) for tensor in tensors), sampled_reward)
