"""Count the bytes that kernels read and write in Triton's interpreter, against the cost model.

Columns: bytes read and written per call, in total and per element of the scored logits (per token
for the group pass); what the cost model allows; and the same for naive PyTorch (fp32 log_softmax
and gather, with autograd). The latter is summed over operators as they run: a view moves nothing,
any other operator reads its inputs once and writes its outputs once.

Exit code 1 if a kernel moves more than the model allows, accesses memory outside its tensors, or
races.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..objectives import RPOObjective
from .needs import positive, require
from .table import show

COLUMNS = {
    "call": "call",
    "what": "what",
    "read": "read bytes",
    "written": "written bytes",
    "unit": "per",
    "read_per_unit": "read",
    "written_per_unit": "written",
    "model": "model",
    "verdict": "verdict",
}
IGNORED_SHARE = 0.5


class OperatorTraffic(TorchDispatchMode):
    """Sum the bytes that operators read and write: each input once and each output once.

    Views and uninitialised memory cost nothing, fills only their output, and a gather or an
    in-place scatter only the elements that it selects.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name in ("detach", "empty", "empty_like", "empty_strided", "new_empty"):
            return out
        inputs, outputs = (
            [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
            for tree in ((args, kwargs), out)
        )
        read, written = (sum(x.nbytes for x in tensors) for tensors in (inputs, outputs))
        if re.match(r"(new_)?(zeros|ones|full)|zero_|fill_|scalar_tensor|arange", name):
            read = 0
        # scatter_add is out of place only under a dispatch mode
        elif name in ("gather", "scatter_add", "scatter_add_"):
            whole, picked = args[0].nbytes, args[2].numel() * args[0].element_size()
            read += picked - whole
            written = picked
        self.read, self.written = self.read + read, self.written + written
        return out


def naive_rpo_loss(logits: Tensor, labels: Tensor, rewards: Tensor, ref: Tensor) -> Tensor:
    """Squared pairwise loss from fp32 log-probabilities, as trainers write it."""
    logps = torch.log_softmax(logits.float(), -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    s = 0.1 * torch.where(labels >= 0, logps - ref, 0).sum(-1)
    u = (s - rewards).view(-1, 2)
    return ((u[:, 0] - u[:, 1]) ** 2 / 2).mean()


def counted_naive(steps: Callable[[], Any]) -> tuple[int, int]:
    with OperatorTraffic() as traffic:
        steps()
    return traffic.read, traffic.written


def measured(dtype: torch.dtype, V: int, share: float) -> list[dict[str, Any]]:
    """Return the rows for a batch of 4 sequences of 8 tokens, of which a share is scored."""
    from .. import rpo_loss
    from .ledger import ledger

    g = torch.Generator().manual_seed(0)
    S, T = 4, 8
    logits = torch.randn(S, T, V, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (S, T), generator=g)
    labels[:, round(T * share) :] = -100
    rewards, ref = torch.randn(S, generator=g), -torch.rand(S, T, generator=g)
    objective = RPOObjective("squared", 0.1)
    with ledger() as launches:
        out = rpo_loss(logits, labels, rewards, objective, ref_logps=ref, backend="triton")
        out.loss.backward()
    N, scored, size = S * T, int((labels != -100).sum()), logits.element_size()
    call = f"{str(dtype)[6:]}, V = {V:,}, {share:.0%} scored"
    # besides the logits: a few numbers per token, and the label's logit once more
    models = {
        "_vocabulary_forward_kernel": (scored * (V + 1) * size, 0, "each scored row read once"),
        "_group_pass_kernel": (0, 0, "log-probs and references once, labels twice"),
        "_vocabulary_backward_kernel": (
            scored * V * size,
            N * V * size,
            "each scored row read once, every row written once",
        ),
    }
    rows = []
    for launch in launches:
        read, written = sum(launch.loaded_bytes.values()), sum(launch.stored_bytes.values())
        reads, writes, model = models[launch.kernel]
        per_token = 64 * N + 4096  # bytes
        ok = (
            read <= reads + per_token
            and written <= writes + per_token
            and not launch.stray
            and not launch.races
        )
        over_tokens = launch.kernel == "_group_pass_kernel"
        unit, units = ("token", N) if over_tokens else ("logit", N * V)
        rows.append(
            _row(
                call,
                launch.kernel.strip("_").removesuffix("_kernel"),
                read,
                written,
                unit,
                units,
                model,
                ok,
            )
        )
    rows.append(
        _row(
            call,
            "rpo_kernels, all",
            sum(row["read"] for row in rows),
            sum(row["written"] for row in rows),
            "logit",
            N * V,
            "",
            None,
        )
    )
    x = logits.detach().requires_grad_()
    read, written = counted_naive(lambda: naive_rpo_loss(x, labels, rewards, ref).backward())
    rows.append(_row(call, "naive PyTorch, all", read, written, "logit", N * V, "", None))
    return rows


def _row(
    call: str,
    what: str,
    read: int,
    written: int,
    unit: str,
    units: int,
    model: str,
    ok: bool | None,
) -> dict[str, Any]:
    verdict = None if ok is None else "ok" if ok else "FAIL"
    return {
        "call": call,
        "what": what,
        "read": read,
        "written": written,
        "unit": unit,
        "read_per_unit": round(read / units, 3),
        "written_per_unit": round(written / units, 3),
        "model": model or None,
        "verdict": verdict,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vocabulary", type=positive, default=4_097, metavar="V", help="(default: %(default)s)"
    )
    parser.add_argument("--markdown", action="store_true", help="print a table for a page")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def run(args: argparse.Namespace) -> int:
    require("traffic", "triton", "numpy")
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported, which read it
    rows = []
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter"
        )
        for dtype, share in (
            (torch.float32, 1.0),
            (torch.bfloat16, 1.0),
            (torch.bfloat16, IGNORED_SHARE),
        ):
            rows += measured(dtype, args.vocabulary, share)
    print(show(rows, COLUMNS, "json" if args.json else "markdown" if args.markdown else "text"))
    failed = sum(row["verdict"] == "FAIL" for row in rows)
    print(f"traffic: {failed} kernels move more than the model", file=sys.stderr)
    return 1 if failed else 0
