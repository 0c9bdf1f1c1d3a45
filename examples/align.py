"""Align a language model with Reward-aware Preference Optimization, and show that it worked.

    python examples/align.py                                  # SmolLM2-135M learns instructions
    python examples/align.py --model DIR --data FILE.jsonl    # your model, your preferences

Without --data, training is online: each step samples responses to its prompts from the policy
itself, a judge written in code rewards them, and one RPO step follows. With --data, responses and
rewards come from a file of JSON Lines: rows of prompt, chosen, rejected (and chosen_reward,
rejected_reward or score_chosen, score_rejected), or of prompt, responses, rewards.

The training loop is `train`; everything else prepares its batches or measures the policy.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from statistics import fmean

import torch
from demo import data, memory, models, options, prompts
from demo.data import Batch, Group
from demo.judge import judge
from demo.report import Report, win_rate
from torch import Tensor
from tqdm import tqdm

from rpo_kernels import RPOObjective, RPOOutput, sequence_logps
from rpo_kernels.adapters.transformers import attach, model_token_logps


def train(
    policy, reference, batches: Iterable[Batch], objective, temperature: float, lr: float
) -> Iterator[dict]:
    """Train, and yield metrics of each step from before its update; an ordinary training loop."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    for batch in batches:
        out, log_ratios = rpo(policy, reference, batch, objective, temperature)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield {
            "loss": out.loss.item(),
            "reward": batch.sampled_reward,
            "accuracy": out.metrics()["rewards/agreement"].item(),
            "log ratio": log_ratios.mean().item(),
        }


def rpo(
    policy, reference, batch: Batch, objective: RPOObjective, temperature: float
) -> tuple[RPOOutput, Tensor]:
    """Return the RPO loss of a batch, and its responses' log(policy / reference), `[S]` in nats."""
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "shift_labels": batch.labels,
    }
    with models.precision(policy.device):
        with torch.no_grad():
            ref_logps = model_token_logps(reference, inputs, temperature=temperature).logps
        out = policy(
            **inputs,
            rewards=batch.rewards if objective.uses_rewards else None,
            objective=objective,
            ref_logps=None if objective.reference == "none" else ref_logps,
            cu_groups=batch.cu_groups,
            temperature=temperature,
        )
    return out, out.logps - sequence_logps(ref_logps)


def online(policy, tokenizer, tasks: list[prompts.Task], args) -> Iterator[Batch]:
    """Yield fresh, judged responses of the current policy.

    Groups with equal rewards, which compare nothing, are left out.
    """
    endless = itertools.cycle(tasks)
    for _ in range(args.steps):
        sampled = answer(policy, tokenizer, list(itertools.islice(endless, args.prompts)), args)
        groups = [group for group in sampled if len(set(group.rewards)) > 1] or sampled
        if not args.objective.uses_rewards:
            groups = [data.best_first(group) for group in groups]
        yield data.collate(
            groups, policy.device, fmean(reward for group in sampled for reward in group.rewards)
        )


def offline(policy, groups: list[Group], args) -> Iterator[Batch]:
    """Yield minibatches of given responses, in a new order each epoch."""
    endless = itertools.chain.from_iterable(
        random.sample(groups, len(groups)) for _ in itertools.count()
    )
    for _ in range(args.steps):
        yield data.collate(list(itertools.islice(endless, args.prompts)), policy.device)


def answer(policy, tokenizer, tasks: list[prompts.Task], args) -> list[Group]:
    """Sample K responses to each task from the policy, and judge them."""
    asked = [data.prompt_ids(tokenizer, task.prompt) for task in tasks]
    sampled = models.sample(
        policy, tokenizer, asked, args.responses, args.sample_tokens, args.temperature
    )
    rewards = [
        [judge(*task, text) for text in texts(tokenizer, answers)]
        for task, answers in zip(tasks, sampled)
    ]
    return [Group(*group) for group in zip(asked, sampled, rewards)]


def texts(tokenizer, responses: list[list[int]]) -> list[str]:
    return tokenizer.batch_decode(
        responses, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


@torch.no_grad()
def measure(policy, reference, groups: list[Group], args) -> dict[str, list[float]]:
    """Measure loss, reward, log(policy / reference) and the order of implicit rewards, per group.

    Accuracy is the share of response pairs with different rewards that the implicit rewards order
    alike (ties count half), margin their difference; NaN for a group without such a pair.
    """
    out = defaultdict(list)
    for i in range(0, len(groups), args.prompts):
        batch = data.collate(groups[i : i + args.prompts], policy.device)
        scores, log_ratios = rpo(policy, reference, batch, args.objective, args.temperature)
        out["loss"] += scores.losses.tolist()
        for a, b in itertools.pairwise(batch.cu_groups.tolist()):
            better = batch.rewards[a:b, None] > batch.rewards[a:b]
            margins = (scores.rewards[a:b, None] - scores.rewards[a:b])[better]
            out["margin"].append(margins.mean().item())
            out["accuracy"].append((margins.sign() / 2 + 0.5).mean().item())
            out["reward"].append(batch.rewards[a:b].mean().item())
            out["log ratio"].append(log_ratios[a:b].mean().item())
    return out


def align_online(policy, reference, tokenizer, args) -> Report:
    """Learn to follow instructions from a judge."""
    training, held_out = (
        prompts.tasks(prompts.TRAINING_QUESTIONS),
        prompts.tasks(prompts.HELD_OUT_QUESTIONS),
    )
    held_out = held_out[: args.held_out]
    first = answer(policy, tokenizer, held_out, args)
    before = measure(policy, reference, first, args)
    report = Report(run(policy, reference, online(policy, tokenizer, training, args), args))
    last = answer(policy, tokenizer, held_out, args)
    after = measure(policy, reference, last, args)
    # on answers that were not sampled from this policy
    accuracy = measure(policy, reference, first, args)["accuracy"]
    report.add("judge reward", before["reward"], after["reward"])
    wins = [win_rate(new.rewards, old.rewards) for old, new in zip(first, last)]
    report.add("win rate against before", [0.5] * len(wins), wins)
    report.add("KL to the reference, nats", before["log ratio"], after["log ratio"])
    report.add("implicit reward accuracy", before["accuracy"], accuracy)
    report.peaks = loss_head_peaks(policy, first, args)
    for task, old, new in zip(held_out, first, last):
        report.samples.append(
            task._asdict() | {"before": readable(tokenizer, old), "after": readable(tokenizer, new)}
        )
    return report


def loss_head_peaks(policy, groups: list[Group], args) -> tuple[int, int]:
    """Return peak bytes of a batch's loss head: naive PyTorch's and ours."""
    batch = data.collate(groups[: args.prompts], policy.device)
    return memory.loss_head_peaks(policy, batch, args.objective, args.temperature)


def readable(tokenizer, group: Group) -> list[dict]:
    return [
        {"text": t, "reward": r} for t, r in zip(texts(tokenizer, group.responses), group.rewards)
    ]


def align_offline(policy, reference, tokenizer, args) -> Report:
    """Learn from a file of preferences."""
    groups = [
        data.encode(tokenizer, row, args.max_tokens)
        for row in random.sample(args.rows, len(args.rows))
    ]
    if not args.objective.uses_rewards:
        groups = [data.best_first(group) for group in groups]
    held_out, training = groups[: args.held_out], groups[args.held_out :]
    before = measure(policy, reference, held_out, args)
    report = Report(run(policy, reference, offline(policy, training, args), args))
    after = measure(policy, reference, held_out, args)
    report.add("implicit reward accuracy", before["accuracy"], after["accuracy"])
    report.add("implicit reward margin", before["margin"], after["margin"])
    report.add("loss", before["loss"], after["loss"])
    report.peaks = loss_head_peaks(policy, held_out, args)
    asked = [group.prompt for group in held_out]
    sampled = models.sample(policy, tokenizer, asked, 1, args.sample_tokens, args.temperature)
    fresh = [Group(prompt, responses, [0.0]) for prompt, responses in zip(asked, sampled)]
    report.add(
        "KL to the reference, nats",
        [0.0] * len(fresh),
        measure(policy, reference, fresh, args)["log ratio"],
    )
    return report


def run(policy, reference, batches: Iterable[Batch], args) -> list[dict]:
    """Train with a progress bar."""
    steps = []
    with tqdm(total=args.steps, desc="RPO", unit="step") as bar:
        for step in train(policy, reference, batches, args.objective, args.temperature, args.lr):
            steps.append(step)
            known = {name: f"{x:.2f}" for name, x in step.items() if not math.isnan(x)}
            bar.set_postfix(known, refresh=False)
            bar.update()
    return steps


def main(arguments: list[str] | None = None) -> Report:
    start = time.perf_counter()
    args = options.parse(arguments, description=__doc__)
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    policy, tokenizer = models.load(args.model, args.device)
    reference = copy.deepcopy(attach(policy)).requires_grad_(False)
    report = (align_online if args.rows is None else align_offline)(
        policy, reference, tokenizer, args
    )
    settings = {name: value for name, value in vars(args).items() if name != "rows"}
    seconds = round(time.perf_counter() - start)
    report.save(args.output, settings | {"seconds": seconds})
    print(
        f"\n{report}\n\n{seconds} s on {args.device}. See {args.output}/training.png and "
        f"{args.output}/results.json."
    )
    return report


if __name__ == "__main__":
    main()
