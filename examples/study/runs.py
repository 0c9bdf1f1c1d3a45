"""One run: from the fine-tuned policy to an aligned one, measured exactly on held-out prompts."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rpo_kernels import linear_rpo_loss

from . import language
from .policy import Policy, adam, imitate, reward_model
from .settings import STEP, Setting

HELD_OUT = 12  # prompts to measure on, and as many of the training prompts
MEASUREMENTS = 5  # after the first one
STRENGTHS = [0.0, *(2 ** (i / 4) for i in range(-12, 33))]  # along the frontier


class Start:
    """What all runs of a seed share, so that differences between them are paired."""

    def __init__(self, seed: int, device: str):
        self.seed, self.device = seed, device
        generator = self.generator("prompts", "cpu")
        order = torch.randperm(len(language.PROMPTS), generator=generator).to(device)
        self.held_out, self.training = order[:HELD_OUT], order[HELD_OUT:]
        self.points = language.judged().double().to(device)  # [prompts, responses]
        self.policy = self.imitator(heed=0.4)
        self.logps = self.policy.distribution(self.held_out)  # [held out, responses]
        seen = self.training[:HELD_OUT]
        self.mean_points = mean(self.points[seen], self.policy.distribution(seen))
        optima = [self.optimum(strength) for strength in STRENGTHS]
        self.frontier = np.array([(kl(x, self.logps), self.reward(x)) for x in optima]).T

    def generator(self, purpose: str, device: str | None = None) -> torch.Generator:
        """Return random numbers that are independent for each purpose."""
        digest = hashlib.sha256(f"{purpose}, seed {self.seed}".encode()).digest()
        number = int.from_bytes(digest[:7], "little")
        return torch.Generator(device or self.device).manual_seed(number)

    def imitator(self, heed: float) -> Policy:
        """Return the policy that was trained on demonstrations of an author."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            policy = Policy().to(self.device)
        return imitate(policy, 200, heed, self.generator(f"author {heed}", "cpu"))

    @cached_property
    def second(self) -> Policy:
        """Return a second reference, trained on a more careful author."""
        return self.imitator(heed=0.7)

    def references(self, several: bool) -> list[Policy]:
        return [self.policy, self.second] if several else [self.policy]

    def optimum(self, strength: float, reference: str = "single") -> Tensor:
        """Return log pi* `[held out, responses]`, pi* = pi_ref exp(strength r) / Z.

        Two references are combined as in the objective.
        """
        logps = self.logps
        if reference != "single":
            both = torch.stack([logps, self.second.distribution(self.held_out)])
            logps = both.mean(0) if reference == "geometric" else -torch.logsumexp(-both, 0)
        return (logps + strength * self.points[self.held_out]).log_softmax(1)

    def reward(self, logps: Tensor) -> float:
        """Return the judge's mean points of a policy `[held out, responses]`."""
        return mean(self.points[self.held_out], logps)

    def efficiency(self, reward: float, kl: float) -> float | None:
        """Return the share of the largest gain in reward at this KL; None near the reference."""
        kls, rewards = self.frontier
        most = float(np.interp(kl, kls, rewards)) - rewards[0]
        return (reward - rewards[0]) / most if kl > 0.01 else None


@lru_cache(maxsize=2)
def start(seed: int, device: str) -> Start:
    return Start(seed, device)


class Data(NamedTuple):
    """Responses `[n]`, with those of a group adjacent."""

    prompts: Tensor
    labels: Tensor  # [n, 4]
    rewards: Tensor
    ref_logps: Tensor  # [R, n, 4], of R references

    def rows(self, at: Tensor) -> Data:
        return Data(self.prompts[at], self.labels[at], self.rewards[at], self.ref_logps[:, at])


@torch.no_grad()
def sample(
    begin: Start, policy: Policy, references: list[Policy], n: int, per_prompt: int, generator
) -> Data:
    """Sample n responses to training prompts; rewards have mean 0 under the reference."""
    which = torch.randint(
        len(begin.training), (n // per_prompt,), generator=generator, device=begin.device
    )
    prompts = begin.training[which].repeat_interleave(per_prompt)
    labels = policy.sample(prompts, generator)
    points = begin.points[prompts, language.response_index(labels)] - begin.mean_points
    ref_logps = torch.stack([reference.token_logps(prompts, labels) for reference in references])
    return Data(prompts, labels, points.float(), ref_logps)


@lru_cache(maxsize=8)
def reference_samples(seed: int, device: str, n: int, per_prompt: int, several: bool) -> Data:
    """Return offline data; runs of a seed with equal arguments get the same."""
    begin = start(seed, device)
    references = begin.references(several)
    return sample(begin, begin.policy, references, n, per_prompt, begin.generator("offline"))


@lru_cache(maxsize=4)
def learned_judge(seed: int, device: str, pairs: int) -> tuple[Policy, float, float, float]:
    """Return a reward model, a scale and shift of its scores, and its accuracy on other pairs.

    Scale and shift give its scores the judge's spread and mean 0.
    """
    begin = start(seed, device)
    samples = lambda n, purpose: sample(
        begin, begin.policy, [begin.policy], n, 2, begin.generator(purpose)
    )
    seen, other = samples(2 * pairs, "judged pairs"), samples(4000, "other pairs")
    model = reward_model(begin.policy, seen.prompts, seen.labels, seen.rewards, steps=300)
    with torch.no_grad():
        scores = model.scores(seen.prompts, seen.labels)
        scale = (seen.rewards.std() / scores.std()).item()
        scored = model.scores(other.prompts, other.labels)
    agree = scored.view(-1, 2).diff(dim=1) * other.rewards.view(-1, 2).diff(dim=1)
    accuracy = ((agree > 0).sum() / (agree != 0).sum()).item()
    return model, scale, -scale * scores.mean().item(), accuracy


def rewarded(begin: Start, setting: Setting, data: Data, generator) -> Data:
    """Return the data as the setting's judge sees them.

    For objectives without rewards, the best response of each group comes first.
    """
    rewards = data.rewards
    if setting.judged_pairs:
        model, scale, shift, _ = learned_judge(begin.seed, begin.device, setting.judged_pairs)
        with torch.no_grad():
            rewards = model.scores(data.prompts, data.labels) * scale + shift
    if setting.noise:
        noise = torch.randn(len(rewards), generator=generator, device=begin.device)
        rewards = rewards + setting.noise * noise
    data = data._replace(rewards=rewards)
    if setting.rpo().uses_rewards:
        return data
    order = rewards.view(-1, setting.K).argsort(dim=1, descending=True, stable=True)
    first = setting.K * torch.arange(len(order), device=begin.device)
    return data.rows((order + first[:, None]).flatten())


def train(begin: Start, setting: Setting) -> Iterator[Policy]:
    """Yield the policy before the first step, and after each."""
    objective, policy = setting.rpo(), copy.deepcopy(begin.policy)
    several = objective.reference in ("geometric", "harmonic")
    references = begin.references(several)
    optimizer, schedule = adam(policy, setting.lr, setting.steps)
    generator = begin.generator("samples")
    period = setting.steps // (setting.rounds or setting.steps)
    n = min(period * STEP, setting.budget or period * STEP)
    per_prompt = setting.per_prompt or setting.K
    for step in range(setting.steps):
        yield policy
        if step == 0:
            data = reference_samples(begin.seed, begin.device, n, per_prompt, several)
        elif step % period == 0:
            if setting.refresh:
                references = [copy.deepcopy(policy)]
            data = sample(begin, policy, references, n, per_prompt, generator)
        if step % period == 0:
            data = rewarded(begin, setting, data, generator)
        batch = data.rows((torch.arange(STEP, device=begin.device) + step % period * STEP) % n)
        ref_logps = batch.ref_logps if several else batch.ref_logps[0]
        out = linear_rpo_loss(
            policy.predicting(batch.prompts, batch.labels),
            policy.head.weight,
            batch.labels,
            batch.rewards if objective.uses_rewards else None,
            objective,
            ref_logps=None if objective.reference == "none" else ref_logps,
            group_size=setting.K,
        )
        out.loss.backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    yield policy


def run(setting: Setting, seed: int, device: str) -> dict:
    """Train, and measure reward, KL to the reference, efficiency and KL to the optimum."""
    began = time.perf_counter()
    begin = start(seed, device)
    optimum, at_optimum = None, None
    if setting.rpo().uses_rewards:
        # one after another: each adds its own
        references = setting.rounds if setting.refresh else 1
        optimum = begin.optimum(setting.strength * references, setting.reference)
        at_optimum = {"reward": begin.reward(optimum), "kl": kl(optimum, begin.logps)}
    curve = []
    for step, policy in enumerate(train(begin, setting)):
        if step * MEASUREMENTS % setting.steps == 0:
            logps = policy.distribution(begin.held_out)
            point = {"step": step, "reward": begin.reward(logps), "kl": kl(logps, begin.logps)}
            point["efficiency"] = begin.efficiency(point["reward"], point["kl"])
            point["distance"] = None if optimum is None else kl(logps, optimum)
            curve.append(point)
    pairs = setting.judged_pairs
    accuracy = learned_judge(seed, device, pairs)[3] if pairs else None
    seconds = round(time.perf_counter() - began, 2)
    return {"curve": curve, "optimum": at_optimum, "judge accuracy": accuracy, "seconds": seconds}


def one_thread() -> None:
    torch.set_num_threads(1)  # a small policy gains nothing from threads, but from processes


def work(task: tuple[Setting, int, str]) -> tuple[Setting, int, dict]:
    """Do a run in a process of the study; here, because processes do not import __main__."""
    return *task[:2], run(*task)


def mean(points: Tensor, logps: Tensor) -> float:
    """Return the expected points `[prompts, responses]` of a policy, as a mean over prompts."""
    return (logps.exp() * points).sum(1).mean().item()


def kl(logps: Tensor, others: Tensor) -> float:
    """KL(policy || other), mean over prompts, in nats."""
    return (logps.exp() * (logps - others)).sum(1).mean().item()
