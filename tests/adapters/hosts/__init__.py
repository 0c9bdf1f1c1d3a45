"""Programs that run a trainer's own code with and without our functions, and compare.

``test_hosts.py`` runs each in a process of its own (``__main__.py``), in which the host and the
releases that it asks for come before ours.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ..snippets import SNIPPETS
from ..tiny_models import llama, tokenizer

STEPS = 3


def write_snippet(title: str, path: Path) -> Path:
    """A section's snippet as the file that its text says to make of it."""
    (source,) = SNIPPETS[title]
    path.write_text(source)
    return path


def write_model(folder: Path) -> Path:
    model = llama()
    model.config.max_position_embeddings = 1024  # of which hosts make limits of their own
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check_equal(what: str, ours: object, theirs: object) -> None:
    """Numbers that a host reports: fp32, some of them small differences of large ones."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (ours, theirs))
    assert b.isfinite().all() and torch.allclose(a, b, rtol=1e-4, atol=2e-6), f"{what}: {a}, {b}"


def check_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict) -> None:
    """After steps of plain SGD, so that what they added is a sum of gradients.

    Weights that are not in ``start`` began at 0 (LoRA's B), or moved little (A).
    """
    assert ours.keys() == theirs.keys()
    moved = {name: x - start.get(name, torch.zeros_like(x)) for name, x in theirs.items()}
    assert all(step.any() for step in moved.values())
    for name, step in moved.items():
        error = (ours[name] - theirs[name]).abs().max()
        assert error <= 1e-3 * step.abs().max() + 1e-7, f"{name}: {error} of {step.abs().max()}"
