"""The package keeps its shape: imports go down only, the face is what it says, and a built wheel
works without this folder.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import rpo_kernels

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rpo_kernels"

# Who may import whom, top floor first. Rooms are the files and folders of the package; "face" is
# __init__.py.
BACKEND = {"backend", "inputs", "checks", "objectives"}
MAY_IMPORT = {
    "__main__": {"tools"},
    "tools": {"face", "ops", "kernels", "torch_backend", "reference", *BACKEND, "_ops"},
    # like any user; further the names on command lines, and sums of objectives
    "adapters": {"face", "objectives", "sums", "group_checks"},
    "face": {"ops", "objectives"},
    "ops": {
        "distributed",
        "gemm",
        *BACKEND,
        "group_checks",
        "sums",
        "_ops",
    },  # the backend is chosen at run time
    "kernels": BACKEND,
    "torch_backend": BACKEND,
    "distributed": BACKEND,
    "gemm": set(),
    "inputs": {"checks", "group_checks", "objectives", "sums"},
    "group_checks": {"checks", "objectives", "sums"},
    "checks": {"backend", "tangents"},
    "tangents": set(),
    "backend": {"objectives"},
    "reference": {"objectives"},  # the truth shares no code with what it is the truth of
    "sums": {"objectives"},
    "objectives": set(),
    "_ops": set(),
}
# Exceptions, inside functions only. Choosing a backend is importing it.
MAY_IMPORT_LAZILY = {"backend": {"kernels", "torch_backend"}}

FACE = {
    "RPOObjective",
    "RPOOutput",
    "gather_responses",
    "linear_rpo_loss",
    "linear_token_logps",
    "linear_token_logps_and_entropy",
    "preference_loss",
    "rpo_loss",
    "sequence_logps",
    "shift_labels",
    "token_logps",
    "token_logps_and_entropy",
}

LINES = 450
# one page of argument each, that a cut would not make clearer; they may shrink, not grow
LONGER = {
    "reference.py": 730,
    "ops/gradients.py": 530,
    "ops/linear_rpo_loss.py": 486,
}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(
    tree: ast.AST, here: tuple[str, ...], *, lazy: bool = False
) -> Iterator[tuple[str, bool]]:
    """Rooms that a module at ``here`` imports, and whether it does so inside a function."""
    for node in ast.iter_child_nodes(tree):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ("rpo_kernels", *here[: len(here) - node.level]) if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            # `from . import checks` imports a module, `from .checks import x` a name of one
            names = (
                [base]
                if base != ("rpo_kernels",)
                else [(*base, alias.name) for alias in node.names]
            )
        for name in names:
            if name[0] == "rpo_kernels":
                room = "".join(name[1:2])
                is_room = room and ((PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").exists())
                yield room if is_room else "face", lazy
        inside = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from imports(node, here, lazy=inside)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_only_go_down(path):
    here = path.relative_to(PACKAGE).with_suffix("").parts
    room = "face" if here == ("__init__",) else here[0]
    assert room in MAY_IMPORT, f"{room} is a new room: say in this table which others it may import"
    for other, lazy in imports(ast.parse(path.read_text()), here):
        allowed = (
            MAY_IMPORT[room] | {room} | (MAY_IMPORT_LAZILY.get(room, set()) if lazy else set())
        )
        assert other in allowed, f"{room} imports {other}"


def test_imports_table_has_no_way_up():
    """Nobody imports the adapters, and the truth nobody but the tools."""
    order = list(MAY_IMPORT)
    for room, others in MAY_IMPORT.items():
        assert all(order.index(room) < order.index(other) for other in others), room
        assert "adapters" not in others and ("reference" not in others or room == "tools")
    assert (
        "torch_backend" not in MAY_IMPORT["kernels"]
        and "kernels" not in MAY_IMPORT["torch_backend"]
    )


@pytest.mark.parametrize(
    "here, source, expected",
    [
        (("ops", "rpo_loss"), "from .. import checks", [("checks", False)]),
        (("ops", "rpo_loss"), "from ..backend import module_of", [("backend", False)]),
        (("ops", "rpo_loss"), "from .output import RPOOutput", [("ops", False)]),
        (
            ("ops", "rpo_loss"),
            "def f():\n  if x:\n    from ..kernels import vocabulary",
            [("kernels", True)],
        ),
        (("checks",), "from .objectives import RPOObjective", [("objectives", False)]),
        (("__init__",), "from .ops.labels import shift_labels", [("ops", False)]),
        (("adapters", "trl"), "from rpo_kernels import rpo_loss", [("face", False)]),
        (("adapters", "trl"), "import rpo_kernels.ops.rpo_loss, torch", [("ops", False)]),
    ],
)
def test_imports_reader_sees_each_form(here, source, expected):
    assert list(imports(ast.parse(source), here)) == expected


def test_import_loads_neither_triton_nor_transformers():
    program = (
        "import sys, torch; before = set(sys.modules); import rpo_kernels\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = run(["-c", program], path=ROOT)
    loaded = ast.literal_eval(done)
    assert "rpo_kernels" in loaded
    assert not {"triton", "transformers", "trl", "numpy"} & set(loaded)


def test_public_names_are_those_of_all():
    assert set(rpo_kernels.__all__) == FACE
    assert sorted(rpo_kernels.__all__) == rpo_kernels.__all__
    visible = {
        name
        for name, x in vars(rpo_kernels).items()
        if not name.startswith("_") and not inspect.ismodule(x)
    }
    assert visible == FACE


@pytest.mark.parametrize("name", sorted(FACE))
def test_public_names_have_docstrings(name):
    thing = getattr(rpo_kernels, name)
    assert inspect.getdoc(thing)
    methods = (
        {}
        if not inspect.isclass(thing)
        else {k: v for k, v in vars(thing).items() if not k.startswith("_")}
    )
    for method, x in methods.items():
        if isinstance(x, (staticmethod, classmethod, property)) or inspect.isfunction(x):
            assert inspect.getdoc(getattr(thing, method)), f"{name}.{method}"


@pytest.mark.parametrize(
    "name", sorted(x for x in FACE if inspect.isfunction(getattr(rpo_kernels, x)))
)
def test_public_functions_take_options_by_keyword(name):
    signature = inspect.signature(getattr(rpo_kernels, name))
    for parameter in signature.parameters.values():
        needed = parameter.default is inspect.Parameter.empty
        assert parameter.kind == (
            parameter.POSITIONAL_OR_KEYWORD if needed else parameter.KEYWORD_ONLY
        ), parameter
        assert parameter.name in inspect.getdoc(
            getattr(rpo_kernels, name)
        ) or "as there" in inspect.getdoc(getattr(rpo_kernels, name)), (
            f"{parameter} is not explained"
        )


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_are_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LONGER.get(path.relative_to(PACKAGE).as_posix(), LINES)


def paths_to_launch(name: str) -> list[list[tuple[str, str]]]:
    """(function, file) of the package's frames from a public call to each vocabulary_forward."""
    x, labels = torch.randn(4, 3, 6, requires_grad=True), torch.randint(6, (4, 3))
    objective, rewards = rpo_kernels.RPOObjective(reference="none"), torch.randn(4)
    calls = {
        "token_logps": lambda: rpo_kernels.token_logps(x, labels),
        "rpo_loss": lambda: rpo_kernels.rpo_loss(x, labels, rewards, objective),
        "linear_rpo_loss": lambda: rpo_kernels.linear_rpo_loss(
            x, torch.randn(7, 6), labels, rewards, objective
        ),
    }
    found: list[list[tuple[str, str]]] = []

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_name == "vocabulary_forward":
            path = []
            while frame is not None:
                file = Path(frame.f_code.co_filename)
                if file.is_relative_to(PACKAGE):
                    path.append((frame.f_code.co_name, file.relative_to(PACKAGE).as_posix()))
                frame = frame.f_back
            found.append(path[::-1])

    sys.setprofile(profile)
    try:
        calls[name]()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("name", ["token_logps", "rpo_loss", "linear_rpo_loss"])
def test_public_functions_launch_within_four_frames_in_three_files(name):
    found = paths_to_launch(name)
    assert found
    for path in found:
        assert path[0][0] == name and len(path) <= 4 and len({file for _, file in path}) <= 3, path


# ---- the wheel -----------------------------------------------------------------------------------


def run(arguments: list[str], *, path: Path, cwd: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, because setuptools leaves build folders behind."""
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools < 77 does not know license-files; the build needs a newer one")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / "rpo_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--quiet",
        "wheel",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    ]
    run([*pip, "--wheel-dir", str(out), str(source)], path=source, cwd=source)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_package_its_types_and_its_license(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in [*files(), PACKAGE / "py.typed", PACKAGE / "kernels" / "launch_table.json"]
    }
    info = f"rpo_kernels-{rpo_kernels.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == ours
    assert info + "licenses/LICENSE" in names
    metadata = zipfile.ZipFile(wheel).read(info + "METADATA").decode()
    required = [
        line
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert required == ["Requires-Dist: torch>=2.8"]


def test_wheel_works_without_the_repository(wheel, tmp_path):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--quiet",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
    ]
    run([*pip, str(wheel)], path=elsewhere, cwd=elsewhere)
    program = """if True:
        import importlib.metadata, torch, rpo_kernels as r
        logits, labels = torch.zeros(2, 3, 4, requires_grad=True), torch.ones(2, 3).long()
        out = r.rpo_loss(logits, labels, None, r.RPOObjective.dpo(), ref_logps=torch.zeros(2))
        out.loss.backward()
        version = importlib.metadata.version("rpo-kernels")
        print(r.__file__, version, r.__version__, round(out.loss.item(), 4))
    """
    file, installed, version, loss = run(["-c", program], path=target, cwd=elsewhere).split()
    assert Path(file).is_relative_to(target)
    # pyproject.toml reads it from the package
    assert installed == version == rpo_kernels.__version__
    assert loss == "0.6931"  # log 2: policy and reference prefer neither
