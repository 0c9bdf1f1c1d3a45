"""Launches happen on the device of their tensors, and compile nothing for another batch."""

from __future__ import annotations

import ast
from pathlib import Path

import torch

from rpo_kernels.kernels import group_pass, scaling, shards, vocabulary_backward, vocabulary_forward
from rpo_kernels.kernels.batch import Numbers
from rpo_kernels.kernels.launch import on_device_of

ROOT = Path(__file__).parents[2]


def test_launch_uses_the_device_of_the_tensors(monkeypatch):
    """Triton launches on the current device, whatever device the tensors are on."""

    class OnGPU1:
        device, dtype = torch.device("cuda:1"), torch.float32

    now = [0]

    class device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            now.append(self.index)

        def __exit__(self, *_):
            now.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    seen = []

    with on_device_of(OnGPU1()):
        seen.append(now[-1])
    assert seen == [1] and now == [0]
    now[:] = [1]
    with on_device_of(OnGPU1()):
        seen.append(now[-1])
    assert seen == [1, 1] and now == [1]
    now[:] = [0]
    with on_device_of(torch.zeros(3)):
        seen.append(now[-1])
    assert seen == [1, 1, 0]


def test_launch_is_how_every_kernel_is_launched():
    """Under a ``with`` that makes the device of its tensors current."""
    for path in sorted((ROOT / "rpo_kernels").rglob("*.py")):
        tree = ast.parse(path.read_text())
        guarded = {
            id(x)
            for node in ast.walk(tree)
            if isinstance(node, ast.With)
            and "on_device_of(" in ast.unparse(node.items[0].context_expr)
            for x in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("_kernel"):
                assert id(node) in guarded, (path, ast.unparse(node))


FLOATS = {"pre", "post", *Numbers._fields}  # Triton never specialises on floats


def test_launch_specialises_no_kernel_on_addresses_and_numbers():
    """Read from the source: the interpreter forgets it."""
    seen = 0
    for module in (group_pass, scaling, shards, vocabulary_backward, vocabulary_forward):
        for node in ast.parse(Path(module.__file__).read_text()).body:
            if not (isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")):
                continue
            (decorator,) = node.decorator_list
            free = {x.arg: eval(ast.unparse(x.value), vars(module)) for x in decorator.keywords}
            arguments = [x for x in node.args.args if x.annotation is None]  # not constexpr
            pointers = {x.arg for x in arguments if x.arg.endswith("_ptr")}
            numbers = {x.arg for x in arguments} - pointers - FLOATS
            assert pointers <= set(free["do_not_specialize_on_alignment"]), node.name
            assert numbers <= set(free["do_not_specialize"]), node.name
            seen += 1
    assert seen == 6
