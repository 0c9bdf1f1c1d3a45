"""Predicted cost of the loss head on each rank of a tensor-parallel group; writes scaling.md.

    python benchmarks/scaling.py

Nothing here is measured: these are formulas over the rates below. Sizes of chunks are those that
the library would plan.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tabulate import tabulate

from rpo_kernels.inputs import LogitTransform
from rpo_kernels.ops import head
from rpo_kernels.ops.head import GPU_FROZEN_ROWS, GPU_WORKSPACE, Chunks, Options

ROOT = Path(__file__).parent.parent
GEMM = 798e12  # flop/s, bf16
MEMORY = 3.0e12  # bytes/s of a copy
LINKS = {"NVLink": 450e9, "InfiniBand": 50e9}  # bytes/s in each direction, per GPU
LATENCY = 20e-6  # s of a small all-gather
NAIVE = 30  # bytes per logit of fp32 log_softmax and gather, forward and backward

MODELS = {"8B": 4096, "70B": 8192, "405B": 16384}  # hidden size H
VOCABULARY, LARGE_VOCABULARY = 128_256, 262_144
TOKENS = (32_768, 131_072)  # scored
DEGREES = (1, 2, 4, 8)


def plan(N: int, V: int, trainable: bool = True, H: int = 0) -> Chunks:
    """Plan rows of logits and of P for a bf16 head with fp32 logits.

    If P of all rows fits with the memory that an fp32 sum of dweight `[V, H]` would take, there is
    no such sum.
    """
    options = Options(LogitTransform(), torch.bfloat16, torch.float32, GPU_WORKSPACE, "triton")
    return head.plan("", options, V, N, True, trainable, 4 * H)


def cost(
    N: int, H: int, V: int, tp: int, link: float = LINKS["NVLink"], trainable: bool = True
) -> dict[str, float]:
    """Return seconds and bytes of `linear_rpo_loss`, forward and backward, on one rank.

    N is the number of scored tokens.
    """
    columns = -(-V // tp)
    chunks = plan(N, columns, trainable, H)
    gathers = -(-N // chunks.logits)
    windows = -(-N // chunks.waiting) if trainable else 0
    gemms = (3 if trainable else 2) * 2 * N * H * columns / GEMM
    # fp32 logits are read in forward and backward, bf16 dlogits written; with several windows
    # dweight is summed in fp32
    rows = (4 + 4 + 2) * N * columns / MEMORY
    sums = (8 * windows + 2) * H * columns / MEMORY if windows > 1 else 0.0
    statistics = gathers * LATENCY + 3 * 4 * N * (tp - 1) / link if tp > 1 else 0.0
    dhidden = 2 * (tp - 1) / tp * 2 * N * H / link  # all-reduce in a ring, bf16
    # The sum of a window's rows overlaps its dweight GEMM; with a frozen head the GEMMs of the next
    # window, of which the last one has none.
    share = gemms / (3 if trainable else 2)
    last = 0.0 if trainable else min(1.0, chunks.waiting / N)
    exposed = max(0.0, dhidden - share) * (1 - last) + dhidden * last
    # bf16 weight and gradient, fp32 sum
    weights = columns * H * (2 + (2 if trainable else 0) + (4 if windows > 1 else 0))
    return {
        "gemms": gemms,
        "rows": rows,
        "sums": sums,
        "statistics": statistics,
        "dhidden": dhidden,
        "time": gemms + rows + sums + statistics + exposed,
        "exposed": exposed,
        "weights": weights,
        "hidden": 2 * 2 * N * H,
        "workspace": min(GPU_WORKSPACE, (4 * chunks.logits + 2 * chunks.waiting) * columns),
        "naive": NAIVE * N * columns,
        "gathers": gathers,
        "windows": windows,
    }


def crossing(V: int, link: float, gemms: int) -> float:
    """Degree at which the all-reduce of dhidden takes as long as the GEMMs.

        4 N H (tp-1)/tp / link = gemms 2 N H V / (tp GEMM)

    It is the tensor-parallel degree tp.
    """
    return 1 + gemms * V * link / (2 * GEMM)


def latency_crossing(H: int, V: int, gemms: int) -> float:
    """Degree at which gathering a chunk's statistics takes as long as its GEMMs, for narrow shards."""
    return gemms * 2 * plan(1 << 20, 1).logits * H * V / (GEMM * LATENCY)


def hiding(V: int, link: float) -> float:
    """Degree up to which the all-reduce of dhidden is hidden by one GEMM of as many rows."""
    return crossing(V, link, 1)


def context(N: int, H: int, V: int, cp: int) -> dict[str, float]:
    """Return seconds on one of `cp` ranks that share N tokens, each with the whole head.

    They are for one call, and for a composition of functions of token log-probabilities, which
    recomputes the logits of rows whose P was dropped.
    """
    c, rows = cost(N // cp, H, V, 1), N // cp
    chunks = plan(rows, V, H=H)
    windows = -(-rows // chunks.waiting)
    # log-probabilities and references of tokens
    travel = windows * 2 * LATENCY + 2 * 4 * N * (cp - 1) / cp / LINKS["NVLink"]
    dropped = max(0, rows - chunks.waiting + chunks.logits) / rows if windows > 1 else 0
    return {
        "call": c["time"] + travel,
        "composed": c["time"] + travel + dropped * c["gemms"] / 3,
        "travel": travel,
    }


def table(V: int) -> str:
    rows = []
    for model, H in MODELS.items():
        for N in TOKENS:
            for tp in DEGREES:
                c = cost(N, H, V, tp)
                rows.append(
                    [
                        model,
                        f"{N // 1024}k",
                        tp,
                        *(
                            f"{1e3 * c[x]:.1f}"
                            for x in ("gemms", "rows", "sums", "statistics", "dhidden", "time")
                        ),
                        *(f"{c[x] / 2**30:.2f}" for x in ("weights", "hidden", "workspace")),
                        f"{c['naive'] / 2**30:.0f}",
                    ]
                )
    headers = [
        "model",
        "tokens",
        "TP",
        "GEMMs ms",
        "row passes ms",
        "dweight sums ms",
        "statistics ms",
        "dhidden ms",
        "in all ms",
        "weight + gradient GiB",
        "hidden + gradient GiB",
        "workspace GiB",
        "naive logits GiB",
    ]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def page() -> str:
    crossings = tabulate(
        [
            [f"{V:,}", name, *(f"{crossing(V, link, gemms):.0f}" for gemms in (3, 2))]
            for V in (VOCABULARY, LARGE_VOCABULARY)
            for name, link in LINKS.items()
        ],
        ["vocabulary", "link", "TP, trainable head (3 GEMMs)", "TP, frozen head (2 GEMMs)"],
        tablefmt="github",
        disable_numparse=True,
    )
    latencies = ", ".join(
        f"{latency_crossing(H, VOCABULARY, 3):.0f} for {model}" for model, H in MODELS.items()
    )
    small, large = (cost(TOKENS[0], MODELS["8B"], V, 1) for V in (VOCABULARY, LARGE_VOCABULARY))
    contexts = tabulate(
        [
            [
                model,
                f"{N // 1024}k",
                cp,
                *(
                    f"{1e3 * context(N, H, VOCABULARY, cp)[x]:.1f}"
                    for x in ("travel", "call", "composed")
                ),
            ]
            for model, H in MODELS.items()
            for N in TOKENS
            for cp in DEGREES[1:]
        ],
        [
            "model",
            "tokens",
            "CP",
            "log-probs travel ms",
            "linear_rpo_loss(context_group=) ms",
            "composed ms",
        ],
        tablefmt="github",
        disable_numparse=True,
    )
    eighth = cost(TOKENS[0], MODELS["8B"], LARGE_VOCABULARY, 8)
    return f"""# The loss head on many GPUs, on paper

Written by `python benchmarks/scaling.py`; **nothing on this page is measured**. It follows from these assumptions:

| quantity | assumed | source |
|---|---|---|
| bf16 GEMM | {GEMM / 1e12:.0f} TFLOP/s | planning figure for large cuBLAS GEMMs on an H100 SXM (data sheet: 989, dense) |
| memory copy | {MEMORY / 1e12:.1f} TB/s | planning figure for an H100 SXM (data sheet: 3.35) |
| NVLink | {LINKS["NVLink"] / 1e9:.0f} GB/s each way per GPU | NVIDIA's data sheet: 900 GB/s both ways; NCCL reaches less |
| InfiniBand | {LINKS["InfiniBand"] / 1e9:.0f} GB/s each way per GPU | one 400 Gb/s port per GPU, nominal |
| a small all-gather | {LATENCY * 1e6:.0f} us | a guess, for one node |
| naive PyTorch | {NAIVE} bytes per logit | fp32 log_softmax and gather, forward and backward |

Models of {", ".join(f"{m} (H = {H:,})" for m, H in MODELS.items())}; bf16 weights and hidden states, fp32 logits, the default
workspace of {GPU_WORKSPACE >> 30} GiB; all tokens scored; a trainable head. With N tokens, V columns and R ranks, on each rank:

    GEMMs         3 x 2 N H V/R / {GEMM / 1e12:.0f}e12              (2 x with a frozen head, 1 x without gradients)
    row passes    10 N V/R / {MEMORY / 1e12:.1f}e12                   fp32 logits read twice, bf16 dlogits written once
    dweight sums  8 H V/R per window / {MEMORY / 1e12:.1f}e12         where P of all tokens exceeds workspace + 4 H V/R bytes
    statistics    one all-gather per chunk of logits, 12 N (R-1) bytes
    dhidden       4 N H (R-1)/R bytes / link            a window's sum runs beside its dweight GEMM (frozen heads: beside
                                                        the next window's GEMMs); "in all" counts what outlasts it
    naive logits  {NAIVE} N V/R bytes                       what PyTorch would hold in place of the workspace

A window is as many rows as P waits for. "weight + gradient" counts bf16 weight and gradient, and the fp32 sum where there are several
windows.

## V = {VOCABULARY:,}, one node (NVLink)

{table(VOCABULARY)}

## Where communication overtakes the GEMMs

The dhidden all-reduce moves 4 N H (R-1)/R bytes, the GEMMs do 6 N H V/R flop: N and H cancel, and the two take equally long at
R = 1 + 3 V link / (2 x {GEMM / 1e12:.0f}e12).

{crossings}

So within a node it never does. A window's sum is hidden by one GEMM of its rows up to
R = {hiding(VOCABULARY, LINKS["NVLink"]):.0f} over NVLink and {hiding(VOCABULARY, LINKS["InfiniBand"]):.0f} over InfiniBand;
a frozen head has nothing to hide that of the last window ({GPU_FROZEN_ROWS:,} rows). The statistics cost latency, not bandwidth:
one gather per chunk of {plan(1 << 20, 1).logits} rows takes as long as the chunk's GEMMs at R = {latencies}.
Megatron's layers and sequence parallelism (`reduce_dhidden=False`) move the bytes of dhidden elsewhere.

## Context parallelism

Each rank holds N/R of the tokens and the whole head. `linear_rpo_loss(context_group=)` gathers two numbers per token (its
log-probability and reference) window by window and stays at 3 GEMMs; composed of `linear_token_logps`,
`sequence_logps(process_group=)` and `preference_loss` it costs as much where P of all rows waits, and up to one GEMM more beyond,
because P of the rows that do not fit was dropped. The gradient of the weight is each rank's part;
its sum belongs to data parallelism and is not counted. V = {VOCABULARY:,}, one node:

{contexts}

## What changes at V = {LARGE_VOCABULARY:,}

{table(LARGE_VOCABULARY)}

GEMMs, row passes and weights grow by V, {LARGE_VOCABULARY / VOCABULARY:.2f} x; statistics and dhidden do not, so that both
crossings move out by as much. What grows faster is the summing of dweight: a chunk of fp32 logits takes twice the workspace
and leaves less for P. The 8B head at {TOKENS[0] // 1024}k tokens on one GPU has
{small["windows"]:.0f} windows at {VOCABULARY:,} columns and {large["windows"]:.0f} at {LARGE_VOCABULARY:,}; on eight ranks
{eighth["windows"]:.0f}. On one GPU a larger `workspace_bytes` buys that back.
"""


if __name__ == "__main__":
    (ROOT / "benchmarks" / "scaling.md").write_text(page())
