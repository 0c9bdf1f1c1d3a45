"""Write the package as a kernel of the Hugging Face kernels hub.

DIR becomes a kernel's source (edition 5, pure Triton: "noarch"), for `kernel-builder` to build and
upload: build.toml, flake.nix, a card, tests, and the package in torch-ext/. Below build/ lie its
variants, as the builder would write them, so that it loads without a builder and without network:

    kernels.get_local_kernel(Path("DIR"))
    LOCAL_KERNELS=ORG/rpo-kernels=DIR    # in the environment of kernels.get_kernel(...)

It holds what the public functions need: no adapters, no commands.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
from pathlib import Path

from .._ops import NAMESPACE

PACKAGE = Path(__file__).parents[1]
NAME, MODULE = "rpo-kernels", "rpo_kernels"
BACKENDS = ("cpu", "cuda", "rocm")  # for which kernels are tested or compiled
LEFT_OUT = {"__main__.py", "reference.py", "adapters", "tools"}

FLAKE = """{
  description = "Fused kernels for the loss head of preference training";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs = { self, kernel-builder, ... }:
    kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""

# A template of Jinja, which the builder fills in.
CARD = """---
library_name: kernels
license: {{ license }}
---

# rpo_kernels

Fused Triton kernels for the loss head of preference training: Reward-aware Preference Optimization
([arXiv 2502.00203](https://arxiv.org/abs/2502.00203)) and everything it contains, from DPO, IPO and
SimPO to REINFORCE-LOO. The loss comes from hidden states and the head's weight; the logits of a
batch never exist at once.

```python
import torch
from kernels import get_kernel

rpo = get_kernel("{{ repo_id }}", version={{ version }}, trust_remote_code=True)

hidden = torch.randn(4, 16, 64, requires_grad=True)  # [S, T, H]; neighbours are a pair
weight = torch.randn(1000, 64, requires_grad=True)  # [V, H], of the head
labels = torch.randint(1000, (4, 16))  # aligned with `hidden`; -100 where nothing is scored
ref_logps = -100 * torch.rand(4)  # of the reference model

objective = rpo.RPOObjective.dpo(beta=0.1)
out = rpo.linear_rpo_loss(hidden, weight, labels, None, objective, ref_logps=ref_logps)
out.loss.backward()
```

On tensors of a GPU Triton kernels run, on those of a CPU the same functions in PyTorch.
`torch.compile(fullgraph=True)` works. Python >= 3.10, PyTorch >= 2.8.

Tested on CPUs, the kernels in Triton's interpreter; compiled for sm_80, sm_90, sm_100, sm_120 and
gfx942. Not yet run on a GPU.

## Public names

{% for function in functions %}
- `{{ function }}`
{% endfor %}
"""


def build_toml(repo_id: str, version: int) -> str:
    return f"""[general]
name = "{NAME}"
version = {version}
edition = 5
license = "Apache-2.0"
backends = {json.dumps(BACKENDS)}

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
pyext = ["py", "json"]
"""


def tests(repo_id: str, version: int) -> str:
    return f'''"""The kernel as its users load it, against plain PyTorch.

With LOCAL_KERNELS={repo_id}=FOLDER in the environment it comes from that folder.
"""

import kernels
import pytest
import torch
import torch.nn.functional as F

rpo = kernels.get_kernel("{repo_id}", version={version})
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BETA = 0.1


def fused(hidden, weight, labels, ref_logps, objective):
    return rpo.linear_rpo_loss(hidden, weight, labels, None, objective, ref_logps=ref_logps).loss


def naive(hidden, weight, labels, ref_logps, objective):
    logps = F.log_softmax(hidden @ weight.T, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1))
    logps = (logps.squeeze(-1) * (labels != -100)).sum(1)
    chosen, rejected = (BETA * (logps - ref_logps)).view(-1, 2).unbind(1)
    return -F.logsigmoid(chosen - rejected).mean()


@pytest.mark.kernels_ci
@pytest.mark.parametrize("compiled", [False, True])
def test_linear_rpo_loss_has_the_loss_and_gradients_of_plain_pytorch(compiled):
    torch.manual_seed(0)
    labels = torch.randint(101, (4, 7), device=DEVICE)
    labels[:, :2] = labels[1, 5:] = -100
    ref_logps = -torch.rand(4, device=DEVICE)
    leaves = [torch.randn(4, 7, 16, device=DEVICE), torch.randn(101, 16, device=DEVICE)]
    objective = rpo.RPOObjective.dpo(BETA)
    results = []
    for loss in (torch.compile(fused, fullgraph=True) if compiled else fused, naive):
        hidden, weight = (x.clone().requires_grad_() for x in leaves)
        value = loss(hidden, weight, labels, ref_logps, objective)
        value.backward()
        results.append((value.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
'''


def sources() -> dict[str, bytes]:
    """Files of the package that belong into a kernel, by their paths in it."""
    names = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*"))
    chosen = (x for x in names if x.suffix in (".py", ".json") and x.parts[0] not in LEFT_OUT)
    return {name.as_posix(): (PACKAGE / name).read_bytes() for name in sorted(chosen)}


def variant(backend: str, version: int) -> dict[str, bytes]:
    """Files of a built variant: the sources, an `_ops.py` with a namespace that is unique to
    their content, and metadata with their digests.
    """
    files = sources()
    content = repr((version, sorted(files.items()))).encode()
    identifier = f"_{MODULE}_{backend}_{hashlib.sha256(content).hexdigest()[:7]}"
    old, new = f'"{NAMESPACE}"'.encode(), f'"{identifier}"'.encode()
    files["_ops.py"] = files["_ops.py"].replace(old, new)
    metadata = {
        "name": NAME,
        "id": identifier,  # also the name under which the package is imported
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {
                name: base64.b64encode(hashlib.sha256(data).digest()).decode()
                for name, data in files.items()
            },
        },
    }
    return files | {"metadata.json": json.dumps(metadata, indent=2).encode()}


def layout(repo_id: str, version: int) -> dict[str, bytes]:
    """All files of the kernel's repository, by their paths in it."""
    texts = {
        "build.toml": build_toml(repo_id, version),
        "flake.nix": FLAKE,
        "CARD.md": CARD,
        "tests/__init__.py": "",
        "tests/test_rpo_kernels.py": tests(repo_id, version),
    }
    found = {name: text.encode() for name, text in texts.items()}
    # without _ops.py: the builder generates it
    found |= {f"torch-ext/{MODULE}/{x}": data for x, data in sources().items() if x != "_ops.py"}
    for backend in BACKENDS:
        files = variant(backend, version)
        found |= {f"build/torch-{backend}/{name}": data for name, data in files.items()}
    return found


def _repo_id(text: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise argparse.ArgumentTypeError(f"expected OWNER/NAME, got {text!r}")
    return text


def _version(text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"expected an integer >= 0, got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", type=Path, help="new, or empty")
    parser.add_argument(
        "--repo-id",
        type=_repo_id,
        default=f"ORG/{NAME}",
        metavar="OWNER/NAME",
        help="the kernel's repository on the hub (default: %(default)s)",
    )
    parser.add_argument(
        "--version",
        type=_version,
        default=0,
        metavar="N",
        help="of the kernel's interface; 0 means beta (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    directory = args.directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise SystemExit(f"hub: {directory} exists and is not an empty folder; name a new one")
    files = layout(args.repo_id, args.version)
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    print(f"{directory}: {args.repo_id}, version {args.version}, {len(files)} files")
    print(f"to load it here: LOCAL_KERNELS={args.repo_id}={directory.resolve()}")
    return 0
