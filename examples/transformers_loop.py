"""A bare training loop: a causal language model learns preferences, with the loss in its forward.

    python examples/transformers_loop.py                                  # SmolLM2-135M, rows below
    python examples/transformers_loop.py --model DIR --data FILE.jsonl    # yours

With --lora it trains an adapter, and the model without the adapter is the reference.
"""

from __future__ import annotations

import argparse
import copy
import random

import torch
from demo import data, models

from rpo_kernels import RPOObjective
from rpo_kernels.adapters.transformers import attach, model_rpo_loss

# answers that keep to the point are better; rewards tell by how much
CITIES = {
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Peru": "Lima",
    "Egypt": "Cairo",
    "Cuba": "Havana",
}
ROWS = [
    {
        "prompt": f"What is the capital of {country}?",
        "rewards": [2.0, 1.0, 0.0],
        "responses": [f"{city}.", f"It is {city}, I think, a lovely city.", "Well."],
    }
    for country, city in CITIES.items()
]


def train(
    model, groups: list[data.Group], objective: RPOObjective, steps: int, lr: float
) -> list[dict[str, float]]:
    """Run the loop, and return the metrics of each step."""
    attach(model)
    reference = None  # a model with an adapter: itself without
    if not hasattr(model, "disable_adapter"):
        reference = copy.deepcopy(model).requires_grad_(False)  # attached, like the model
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0
    )
    history = []
    for step in range(steps):
        batch = collate(random.sample(groups, 4), model.device)
        with models.precision(model.device):
            out = model_rpo_loss(model, batch, objective, reference=reference)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(
            {"loss": out.loss.item(), **{name: x.item() for name, x in out.metrics().items()}}
        )
        print(
            f"step {step + 1}: "
            + ", ".join(f"{name} {value:.3f}" for name, value in history[-1].items())
        )
    return history


def collate(groups: list[data.Group], device) -> dict[str, torch.Tensor]:
    """Return the arguments of the model and of the loss."""
    batch = data.collate(groups, device)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    # aligned with logits; `labels` would be unshifted
    inputs |= {"shift_labels": batch.labels}
    return inputs | {"rewards": batch.rewards, "cu_groups": batch.cu_groups}


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="folder or hub name; default: SmolLM2-135M-Instruct from PyPI"
    )
    parser.add_argument("--data", help="JSON Lines of preferences; default: six questions")
    parser.add_argument("--lora", action="store_true", help="train a LoRA adapter (needs peft)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-5)
    args = parser.parse_args(arguments)
    torch.manual_seed(0), random.seed(0)
    model, tokenizer = models.load(args.model, "cuda" if torch.cuda.is_available() else "cpu")
    rows = data.read_preferences(args.data) if args.data else [data.parse(row) for row in ROWS]
    groups = [data.encode(tokenizer, row, max_tokens=256) for row in rows]
    if args.lora:
        import peft

        model = peft.get_peft_model(
            model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        )
    return train(model, groups, RPOObjective("squared", beta=0.1), args.steps, args.lr)


if __name__ == "__main__":
    main()
