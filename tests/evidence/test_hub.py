"""The package as a kernel of the Hugging Face kernels hub: loaded beside the package, and, among
the slow tests, by the hub's own library.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import torch

import rpo_kernels
from rpo_kernels.__main__ import main

ROOT = Path(__file__).parents[2]
REPO_ID = "someone/rpo-kernels"


def write(folder: Path, version: int = 0) -> Path:
    assert main(["hub", str(folder), "--repo-id", REPO_ID, "--version", str(version)]) == 0
    return folder


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("hub") / "kernel")


@pytest.fixture
def load():
    """Loads a built variant as the library ``kernels`` does: under a name of its own."""
    names = []

    def load(variant: Path):
        text = (variant / "metadata.json").read_text()
        name = re.search(r'"id": "(\w+)"', text)[1]
        spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        names.append(name)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in [x for x in sys.modules if x.split(".")[0] in names]:
        del sys.modules[name]


def operators(namespace: str) -> set[str]:
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    return {name.split(".")[0] for space, name in names if space == namespace}


def test_hub_kernel_computes_what_the_package_does_beside_another_version(
    kernel, load, tmp_path, device, backend
):
    first = load(kernel / "build" / "torch-cpu")
    second = load(write(tmp_path / "second", version=1) / "build" / "torch-cpu")
    ours = operators("rpo_kernels")
    assert "linear_rpo_loss" in ours and "gather" in ours
    assert first.__name__ != second.__name__
    assert operators(first.__name__) == operators(second.__name__) == ours

    leaves = torch.randn(4, 7, 6, device=device), torch.randn(11, 6, device=device)
    labels, rewards = torch.randint(11, (4, 7), device=device), torch.randn(4, device=device)
    results = []
    for package in (rpo_kernels, first):
        hidden, weight = (x.clone().requires_grad_() for x in leaves)
        objective = package.RPOObjective(reference="none")
        options = {"group_size": 4, "backend": backend}
        loss = package.linear_rpo_loss(hidden, weight, labels, rewards, objective, **options).loss
        loss.backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_hub_sources_keep_the_rules_of_the_kernels_hub(kernel):
    """Nothing is imported but the standard library, torch, Triton and, relatively, the kernel
    itself; and no operator has a namespace of its own.
    """
    sources = kernel / "torch-ext" / "rpo_kernels"
    assert not (sources / "_ops.py").exists()  # the builder makes it
    assert (sources / "kernels" / "launch_table.json").exists()
    for path in sources.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = {node.module.split(".")[0]}
            else:
                continue
            assert names <= sys.stdlib_module_names | {"torch", "triton"}, f"{path}: {names}"
        named = re.findall(r"custom_op\(\s*([^(,]+)", path.read_text())
        assert set(named) <= {"add_op_namespace_prefix"}, path


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--repo-id", "rpo-kernels"], "expected OWNER/NAME, got 'rpo-kernels'"),
        (["--version", "0.2"], "expected an integer >= 0, got '0.2'"),
        ([], "not an empty folder"),
    ],
)
def test_hub_refuses_what_the_hub_would_not_take(arguments, message, tmp_path, capsys):
    (tmp_path / "full").write_text("")
    with pytest.raises(SystemExit) as raised:
        main(["hub", str(tmp_path), *arguments])
    assert message in f"{raised.value} {capsys.readouterr().err}"
    assert list(tmp_path.iterdir()) == [tmp_path / "full"]


# ---- with the hub's own library ------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment(kernel, tmp_path_factory) -> dict[str, str]:
    """Of a process that has the package ``kernels``, and no network."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    pins = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "--target", str(site), *pins, "kernels"], check=True)
    own = {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "LOCAL_KERNELS": f"{REPO_ID}={kernel}"}
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | own


def run(environment: dict[str, str], cwd: Path, *arguments: str) -> str:
    command = [sys.executable, *arguments]
    options = {"env": environment, "cwd": cwd, "capture_output": True, "text": True}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


VALIDATE = """
from pathlib import Path
from kernels._rust import Backend, Build, Digest, DigestAlgorithm, DigestValidationError, Metadata

build = Build.open(".")
assert set(build.general.backends) == {Backend.CPU, Backend.CUDA, Backend.ROCm}
for backend in build.general.backends:
    variant = Path("build") / f"torch-{str(backend).lower()}"
    metadata = Metadata.read_from_file(variant / "metadata.json")
    assert metadata.backend.backend_type == backend and metadata.version == 0
    assert str(metadata.name) == "rpo-kernels" and metadata.license == "Apache-2.0"
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))

# and what is wrong is found
checks = variant / "checks.py"
text = checks.read_text()
checks.write_text(text + "# changed")
try:
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    raise SystemExit("a changed file has the digest of the old one")
except DigestValidationError as error:
    assert [x.path for x in error.violations] == ["checks.py"]
checks.write_text(text)
"""

LOAD = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel

rpo = get_local_kernel(Path("."))
out = rpo.linear_rpo_loss(
    torch.randn(4, 3, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True),
    torch.ones(4, 3).long(), torch.randn(4), rpo.RPOObjective(reference="none"),
)
out.loss.backward()
assert "rpo_kernels" not in sys.modules and rpo.__name__.startswith("_rpo_kernels_")
print(rpo.__file__)
"""


@pytest.mark.slow
def test_hub_layout_passes_the_checks_of_the_library_kernels(kernel, environment):
    run(environment, kernel, "-c", VALIDATE)


@pytest.mark.slow
def test_hub_kernel_is_loaded_by_get_local_kernel(kernel, environment):
    file = Path(run(environment, kernel, "-c", LOAD).strip())
    assert (kernel / file).resolve().is_relative_to(kernel.resolve() / "build")


@pytest.mark.slow
def test_hub_kernel_passes_its_own_tests_through_get_kernel(kernel, environment, tmp_path):
    """Loss and gradients against plain PyTorch, eager and compiled with fullgraph=True."""
    options = ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestUnknownMarkWarning", "-q"]
    printed = run(environment, tmp_path, "-m", "pytest", *options, str(kernel / "tests"))
    assert "2 passed" in printed


@pytest.mark.slow
def test_hub_card_shows_code_that_runs(kernel, environment, tmp_path):
    template = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined)
    names = {"repo_id": REPO_ID, "version": 0, "license": "apache-2.0"}
    names["functions"] = rpo_kernels.__all__
    card = template.from_string((kernel / "CARD.md").read_text()).render(names)
    assert all(f"- `{name}`\n" in card for name in rpo_kernels.__all__)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    run(environment, tmp_path, "-c", code + "\nassert hidden.grad.norm() > 0 < weight.grad.norm()")
