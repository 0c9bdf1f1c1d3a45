"""README, CONTRIBUTING and the pages in docs: their links resolve, and what they say of the code is
read from the code.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import rpo_kernels

from .test_architecture import MAY_IMPORT, paths_to_launch

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
README = (ROOT / "README.md").read_text()


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def cells(page: str, heading: str) -> list[list[str]]:
    """Rows of the first table below a heading, without its header."""
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_have_relative_links_that_resolve(page):
    text = re.sub(r"`[^`\n]*`", "", without_code(page.read_text()))
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{link}: no such heading"


def test_pages_are_all_linked_from_the_readme_or_the_front_page_of_the_site():
    front = ROOT / "docs" / "index.md"
    for page in {*PAGES} - {ROOT / "README.md", front}:
        links = (
            f"({page.relative_to(ROOT).as_posix()}" in README,
            f"({page.name}" in front.read_text(),
        )
        assert any(links), f"{page.name} is not"


def test_examples_have_each_a_line_in_their_index():
    index = (ROOT / "examples" / "README.md").read_text()
    named = re.findall(r"^\| \[[^]]*\]\(([^)]+)\) \| .+ \|$", index, re.MULTILINE)
    hidden = ("README.md", "__pycache__")
    found = [path.name for path in (ROOT / "examples").iterdir() if path.name not in hidden]
    assert sorted(named) == sorted(name for name in found if not name.startswith("."))


def test_architecture_page_has_the_table_of_imports():
    table = {
        row[0].strip("`"): set() if row[2] == "nothing" else set(re.findall(r"`(\w+)`", row[2]))
        for row in cells(ARCHITECTURE, "Rooms")
    }
    assert table == MAY_IMPORT
    assert list(table) == list(MAY_IMPORT)  # top floor first


def test_architecture_page_has_the_path_of_linear_rpo_loss():
    printed = [
        (name.strip("`").split(".")[-1], re.findall(r"`([\w/]+\.py)`", files)[0])
        for name, files, _ in cells(ARCHITECTURE, "The path of a call")
    ]
    for path in paths_to_launch("linear_rpo_loss"):
        anywhere = [(name, file.replace("torch_backend/", "kernels/")) for name, file in path]
        assert anywhere == printed


def test_architecture_and_contributing_name_files_that_exist():
    """In backticks, from the repository or from the package."""
    for page in (ARCHITECTURE, (ROOT / "CONTRIBUTING.md").read_text()):
        for name in re.findall(r"`([\w/.]+\.(?:py|json|md))`", page):
            assert any((base / name).exists() for base in (ROOT, ROOT / "rpo_kernels")), name


def test_readme_after_computes_the_loss_and_gradients_of_before():
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    before, after = (x for word in ("before", "after") for x in blocks if f"# {word}:" in x)
    results = []
    for source in (before, after):
        torch.manual_seed(0)
        hidden = torch.randn(4, 5, 8, requires_grad=True)
        lm_head, labels = torch.nn.Linear(8, 11, bias=False), torch.randint(11, (4, 5))
        labels[:, :2] = labels[0, 4] = -100
        names = {"F": F, "hidden": hidden, "lm_head": lm_head, "labels": labels}
        names |= {"beta": 0.3, "ref_logps": -torch.rand(4)}
        exec(compile(source, "README.md", "exec"), names)
        names["loss"].backward()
        results.append((names["loss"], hidden.grad, lm_head.weight.grad))
    torch.testing.assert_close(*results)


def test_readme_names_every_public_function():
    assert [
        name for name in rpo_kernels.__all__ if name not in README and name != "RPOOutput"
    ] == []


def test_options_page_has_a_training_step_that_runs():
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "options.md").read_text(), re.S)
    names: dict = {"__name__": "page"}
    exec(compile(source, "docs/options.md", "exec"), names)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(13, 8)
            self.lm_head = torch.nn.Linear(8, 13, bias=False)

        def base_model(self, input_ids, attention_mask):
            return SimpleNamespace(last_hidden_state=self.embedding(input_ids))

    policy, reference = Model(), Model()
    batch = SimpleNamespace(
        input_ids=torch.randint(13, (8, 6)),
        attention_mask=torch.ones(8, 6),
        response_mask=(torch.arange(6) >= 2).expand(8, 6),
        rewards=torch.randn(8),
    )
    optimizer = torch.optim.SGD(policy.parameters(), 1.0)
    first, *_, last = names["train"](policy, reference, [batch] * 20, optimizer)
    assert last["rewards/agreement"] > first["rewards/agreement"]


def test_pre_commit_runs_the_ruff_of_the_constraints():
    pinned = re.search(r"^ruff==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert f"rev: v{pinned} " in (ROOT / ".pre-commit-config.yaml").read_text()
