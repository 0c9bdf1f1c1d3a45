"""A small Llama over the language: log-probabilities, samples, whole distributions, imitation."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from rpo_kernels import RPOObjective, linear_token_logps, preference_loss, sequence_logps

from . import language
from .language import END, IGNORE, LONGEST, TOKENS, WORDS


class Policy(nn.Module):
    """A transformer and a head over responses' tokens; `outputs=1` makes it a reward model."""

    def __init__(self, outputs: int = TOKENS):
        super().__init__()
        config = LlamaConfig(
            vocab_size=language.VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            initializer_range=0.1,
        )
        self.trunk = LlamaModel(config)
        self.head = nn.Linear(config.hidden_size, outputs, bias=False)
        tokens, labels = language.prompt_tokens(), language.response_labels()
        self.register_buffer("prompt_tokens", tokens, persistent=False)
        self.register_buffer("labels", labels, persistent=False)
        # prefixes of 3 words contain all shorter ones: 125 rows of the transformer suffice
        prefixes = torch.cartesian_prod(*[torch.arange(WORDS)] * (LONGEST - 1))
        place = torch.tensor([WORDS**t for t in reversed(range(LONGEST - 1))])
        self.register_buffer("prefixes", prefixes, persistent=False)
        self.register_buffer(
            "prefix_of", (labels[:, :-1].clamp(0, WORDS - 1) * place).sum(1), persistent=False
        )

    def hidden(self, prompts: Tensor, written: Tensor) -> Tensor:
        """Return hidden states `[S, t + 1, H]` after prompts `[S]` and each token of `[S, t]`."""
        asked = self.prompt_tokens[prompts]
        ids = torch.cat([asked, written.clamp(min=0)], 1)  # IGNORE follows all that counts
        return self.trunk(ids, use_cache=False).last_hidden_state[:, asked.shape[1] - 1 :]

    def predicting(self, prompts: Tensor, labels: Tensor) -> Tensor:
        """Return hidden states `[S, 4, H]`, aligned with labels `[S, 4]`."""
        return self.hidden(prompts, labels[:, :-1])

    def token_logps(self, prompts: Tensor, labels: Tensor) -> Tensor:
        """`[S, 4]`."""
        return linear_token_logps(self.predicting(prompts, labels), self.head.weight, labels)

    def scores(self, prompts: Tensor, labels: Tensor) -> Tensor:
        """Return the scores `[S]` of a reward model for whole responses."""
        hidden = self.hidden(prompts, labels)
        return self.head(hidden[torch.arange(len(labels)), (labels != IGNORE).sum(1)])[:, 0]

    @torch.no_grad()
    def distribution(self, prompts: Tensor) -> Tensor:
        """Return log pi(y | x) `[prompts, responses]`, float64, of all responses."""
        rows = len(self.prefixes)
        hidden = self.hidden(prompts.repeat_interleave(rows), self.prefixes.repeat(len(prompts), 1))
        hidden = hidden.view(len(prompts), rows, *hidden.shape[1:])[:, self.prefix_of]
        labels = self.labels.expand(len(prompts), -1, -1)
        return linear_token_logps(hidden, self.head.weight, labels).double().sum(-1)

    @torch.no_grad()
    def sample(self, prompts: Tensor, generator: torch.Generator) -> Tensor:
        """Sample labels `[S, 4]` of one response to each prompt."""
        labels = torch.full((len(prompts), LONGEST), IGNORE, device=prompts.device)
        going = torch.ones_like(prompts, dtype=torch.bool)
        for t in range(LONGEST):
            logits = self.head(self.hidden(prompts, labels[:, :t])[:, -1])
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
            labels[:, t] = torch.where(going, token, IGNORE)
            going &= token != END
        return labels


def imitate(policy: Policy, steps: int, heed: float, generator: torch.Generator) -> Policy:
    """Fine-tune (SFT) on demonstrations of an author."""
    optimizer, schedule = adam(policy, 3e-3, steps)
    device = policy.labels.device
    for _ in range(steps):
        prompts, labels = (x.to(device) for x in language.demonstrations(128, heed, generator))
        nll = -sequence_logps(policy.token_logps(prompts, labels)).mean()
        nll.backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    return policy.eval()


def reward_model(
    policy: Policy, prompts: Tensor, labels: Tensor, points: Tensor, steps: int
) -> Policy:
    """Train the policy's transformer, with a head of one number, on adjacent pairs."""
    model = Policy(outputs=1).to(labels.device)
    model.trunk = copy.deepcopy(policy.trunk)
    nn.init.zeros_(model.head.weight)
    optimizer, schedule = adam(model, 1e-3, steps)
    # -log sigmoid(score gap), Bradley and Terry's model: DPO of scores, without a reference
    bradley_terry = RPOObjective("backward_kl", 1.0, target=math.inf, reference="none")
    best_first = points.view(-1, 2).argsort(1, descending=True)
    pairs = best_first + 2 * torch.arange(len(best_first), device=labels.device)[:, None]
    for step in range(steps):
        batch = torch.arange(step * 32, step * 32 + 32, device=labels.device) % len(pairs)
        at = pairs[batch].flatten()
        preference_loss(model.scores(prompts[at], labels[at]), None, bradley_terry).loss.backward()
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    return model.eval()


def adam(module: nn.Module, lr: float, steps: int):
    """Return Adam, and a learning rate that decays to 0."""
    optimizer = torch.optim.Adam(module.parameters(), lr)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
