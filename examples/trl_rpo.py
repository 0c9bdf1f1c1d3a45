"""Reward-aware Preference Optimization in TRL: a model, scored preferences, one trainer.

    python examples/trl_rpo.py    # SmolLM2-135M on the few pairs that ship with this file
    python examples/trl_rpo.py --model DIR --data FILE.jsonl    # your model, your preferences
    python examples/trl_rpo.py --lora --objective '{"distance": "squared", "eta": 0.5}' --beta 0.05

Rows are `prompt, chosen, rejected` with `chosen_reward, rejected_reward` or `score_chosen,
score_rejected`, or `prompt, responses, rewards` for K responses. The arguments of trl.DPOConfig
work, but for those of its losses (--objective replaces them), and so does `accelerate launch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from demo import models
from peft import LoraConfig
from transformers import AutoTokenizer, HfArgumentParser
from transformers.utils import is_torch_bf16_gpu_available

from rpo_kernels.adapters.trl import RPOConfig, RPOTrainer

PAIRS = Path(__file__).with_name("pairs.jsonl")


@dataclass
class Arguments:
    """What is trained, and on which data."""

    model: str | None = None  # folder or hub name; SmolLM2-135M-Instruct if None
    data: str = str(PAIRS)
    held_out: int = 4  # rows for evaluation, from the end of the file
    lora: bool = False


def chats(row: dict) -> dict:
    """Convert texts to messages, so that the tokenizer's chat template is used."""
    as_messages = lambda role, text: [{"role": role, "content": text}]
    row["prompt"] = as_messages("user", row["prompt"])
    if "responses" in row:
        row["responses"] = [as_messages("assistant", text) for text in row["responses"]]
    else:
        row |= {side: as_messages("assistant", row[side]) for side in ("chosen", "rejected")}
    return row


def parse(arguments: list[str] | None) -> tuple[Arguments, RPOConfig]:
    parser = HfArgumentParser((Arguments, RPOConfig))
    parser.set_defaults(
        output_dir="trl_rpo_output",
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=1e-5,
        logging_steps=5,
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        max_length=512,
        # TRL's default, None, is bf16 on any device
        bf16=None if is_torch_bf16_gpu_available() else False,
    )
    return parser.parse_args_into_dataclasses(arguments)


def main(arguments: list[str] | None = None) -> RPOTrainer:
    args, config = parse(arguments)
    model = args.model or str(models.smollm2())
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = Dataset.from_json(args.data)
    if tokenizer.chat_template is not None:
        data = data.map(chats)
    if len(data) <= args.held_out:
        raise SystemExit(
            f"{args.data}: expected more rows than --held_out {args.held_out}, got {len(data)}: "
            "none is left for training"
        )
    split = len(data) - args.held_out
    trainer = RPOTrainer(
        model,
        args=config,
        train_dataset=data.select(range(split)),
        eval_dataset=data.select(range(split, len(data))) if args.held_out else None,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        if args.lora
        else None,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
