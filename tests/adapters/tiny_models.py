"""Tiny models and data for the tests of adapters: nothing is downloaded."""

from __future__ import annotations

import functools

import torch

WORDS = (
    "red green blue one two three small large cat dog bird runs sleeps sings the a and then".split()
)
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def tokenizer():
    """Words and characters, trained in memory, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<|user|>", "<|assistant|>"]
    raw = Tokenizer(models.BPE(unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        [" ".join(WORDS)] * 20, trainers.BpeTrainer(vocab_size=120, special_tokens=special)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=special[2:],
        chat_template=TEMPLATE,
    )


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


def llama(seed: int = 0):
    """A random Llama of 20,000 parameters; equal seeds give equal models."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer()), **SIZES))


def mixtral(seed: int = 0):
    """A random mixture of four experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=len(tokenizer()), num_local_experts=4, **SIZES)
    )


def text(seed: int, words: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (words,), generator=generator))


def pairs(n: int) -> list[dict]:
    """Preference pairs of unequal lengths, with scores; the last pair is a tie."""
    return [
        {
            "prompt": text(i, 3 + i % 4) + " ",
            "chosen": text(100 + i, 2 + i % 5),
            "rejected": text(200 + i, 6 - i % 5),
            "score_chosen": 2.0 + (i % 3),
            "score_rejected": 4.0 if i == n - 1 and n % 3 == 0 else 1.0 - (i % 2),
        }
        for i in range(n)
    ]
