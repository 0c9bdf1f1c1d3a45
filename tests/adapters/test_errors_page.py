"""Every snippet of docs/errors.md: it raises what the page prints, and its check finds the slips
that raise nothing.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rpo_kernels import linear_token_logps, sequence_logps, shift_labels

pytestmark = [pytest.mark.xdist_group("trl"), pytest.mark.filterwarnings("ignore")]
pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402

from rpo_kernels.adapters.transformers import attach  # noqa: E402

from .tiny_models import llama, tokenizer  # noqa: E402

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
BLOCK = r"```python\n(.*?)```\n"
SNIPPETS = re.findall(BLOCK, PAGE, re.DOTALL)
CASES = re.findall(
    rf"^### (.*?)\n\n{BLOCK}(?:\n```text\n(.*?)```)?", PAGE, re.DOTALL | re.MULTILINE
)
SETUPS = [source for source in SNIPPETS if source not in [source for _, source, _ in CASES]]


def run(source: str, names: dict) -> dict:
    exec(compile(source, "docs/errors.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict:
    """What the page defines, and the three that it takes as given."""
    rows = [{"prompt": "a cat ", "responses": ["sings", "runs"], "rewards": [1.0, 0.0]}] * 2
    names = {"__name__": "page", "tokenizer": tokenizer(), "rows": Dataset.from_list(rows)}
    names |= {"model": attach(llama()), "plain": llama()}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        for source in SETUPS:
            run(source, names)
        yield names


@pytest.mark.parametrize("source, message", [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_errors_page_prints_the_message_of_a_slip(source, message, names):
    before = {name: x._version for name, x in names.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(Exception) as raised:
        run(source, dict(names))
    assert f"{raised.type.__name__}: {raised.value}".split() == message.split()
    assert {name: names[name]._version for name in before} == before, "an argument was written to"


def test_errors_page_has_a_message_for_every_snippet_but_its_setups():
    assert len(CASES) >= 30 and len(SETUPS) == 3
    assert all(len(line) <= 100 for block in SNIPPETS for line in block.splitlines())


# ---- slips that raise nothing --------------------------------------------------------------------


def batch(names: dict) -> dict:
    """Arguments of the page's check, as they should be: right padded, prompts of two tokens."""
    torch.manual_seed(1)
    S, T, H, V = (names[name] for name in "STHV")
    attention_mask = (torch.arange(T) < torch.tensor([6, 5, 4, 6])[:, None]).long()
    response_mask = attention_mask * (torch.arange(T) >= 2)
    input_ids = torch.randint(1, V, (S, T))
    input_ids[1, :2], input_ids[3, :2] = input_ids[0, :2], input_ids[2, :2]
    input_ids *= attention_mask  # the pad token is 0
    hidden, weight = 3 * torch.randn(S, T, H), torch.randn(V, H)
    return with_reference(
        {
            "logits": hidden @ weight.T,
            "hidden": hidden,
            "weight": weight,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "response_mask": response_mask,
            "labels": shift_labels(input_ids, response_mask),
        }
    )


def with_reference(x: dict) -> dict:
    """Log-probabilities of the same labels, by the policy's own weights."""
    return x | {"ref_token_logps": linear_token_logps(x["hidden"], x["weight"], x["labels"])}


TABLE = PAGE.split("| slip |")[1]
SLIPS = {
    "labels not shifted": lambda x: {"labels": x["input_ids"].where(x["response_mask"] == 1, -100)},
    "labels shifted twice": lambda x: {"labels": shift_labels(x["labels"], x["labels"] != -100)},
    "prompts scored": lambda x: {"labels": shift_labels(x["input_ids"], x["attention_mask"])},
    "padding labelled with the pad token": lambda x: {
        "labels": shift_labels(x["input_ids"], (torch.arange(6) >= 2).expand(4, 6))
    },
    "a square weight transposed; hidden states of another layer": lambda x: {
        "hidden": x["hidden"].roll(1, -1)
    },
    "all chosen, then all rejected responses": lambda x: {
        name: rows[[0, 2, 1, 3]] for name, rows in x.items() if name != "weight"
    },
    "the reference saw another batch": lambda x: {"ref_token_logps": x["ref_token_logps"].roll(2)},
    "`ref_logps` in bf16": lambda x: {
        "ref_token_logps": sequence_logps(x["ref_token_logps"]).bfloat16()
    },
}


def test_errors_page_check_passes_a_batch_as_it_should_be(names):
    names["check_batch"](**batch(names))


@pytest.mark.parametrize("slip", SLIPS)
def test_errors_page_check_finds_a_slip_where_the_table_says(slip, names):
    (number,) = re.findall(rf"^\| {re.escape(slip)}.* \| (\d) \|$", TABLE, re.MULTILINE)
    x = batch(names)
    changes = SLIPS[slip](x)
    x = x | changes if "ref_token_logps" in changes else with_reference(x | changes)
    with pytest.raises(AssertionError) as raised:
        names["check_batch"](**x)
    (line,) = (frame.lineno for frame in raised.traceback if frame.name == "check_batch")
    source = next(source for source in SETUPS if "def check_batch" in source)
    assert re.findall(r"# (\d): ", "\n".join(source.splitlines()[: line + 1]))[-1] == number


def test_errors_page_check_finds_as_many_slips_as_the_table_says():
    assert len(re.findall(r"\| \d \|$", TABLE, re.MULTILINE)) == len(SLIPS)
