"""Every kernel compiled for real chips, with no GPU: registers that fit, and logits moved 16 bytes at a time.

Compiling needs a process without Triton's interpreter: this file is also the program of that process, one per chip.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rpo_kernels import RPOObjective

TARGETS = {
    "sm_80": ("cuda", 80, 32),  # A100
    "sm_90": ("cuda", 90, 32),  # H100, H200
    "sm_100": ("cuda", 100, 32),  # B200
    "sm_120": ("cuda", 120, 32),  # RTX 50
    "gfx942": ("hip", "gfx942", 64),  # MI300
}
IN_FULL = "sm_90"  # every variant; the other chips get those that need the fewest and the most registers
V = 151_936
# The group pass is one program, whose occupancy is worth nothing; but ptxas trades registers for it, and keeps up to sixteen of
# a thread's in local memory. A kernel that is short of registers spills hundreds of bytes.
SOME_REGISTERS = 64
FAMILY = list(itertools.product(("squared", "backward_kl", "forward_kl"), ("listwise", "pairwise", "pointwise")))
EVERYTHING = {"average": True, "margin": 0.3, "sft_weight": 0.2, "sft_normalizer": "tokens"}


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_vocabulary(dtype, softcap, entropy, V=V):
    """Forward and backward of three rows."""
    from rpo_kernels.kernels.vocabulary import vocabulary_backward, vocabulary_forward

    logits, labels = meta(1, 3, V, dtype=dtype), meta(3, dtype=torch.int64)
    options = {"temperature": 1.0, "logit_scale": 1.0, "softcap": 30.0 if softcap else 0.0, "ignore_index": -100}
    vocabulary_forward(logits, labels, entropy=entropy, **options)
    entropies = meta(3) if entropy else None
    vocabulary_backward(logits, labels, meta(3), meta(2, 3), meta(3), entropies=entropies, entropy_coef=entropies,
                        upstream=meta(), out=logits, **options)  # fmt: skip


def launch_shards(dtype, columns):
    """Statistics of one of eight shards of a vocabulary, and what puts those of three rows together."""
    from rpo_kernels.kernels.shards import combine
    from rpo_kernels.kernels.vocabulary import shard_statistics

    options = {"temperature": 1.0, "logit_scale": 1.0, "softcap": 30.0, "ignore_index": -2, "entropy": True}
    shard_statistics(meta(1, 3, columns, dtype=dtype), meta(3, dtype=torch.int64), **options)
    combine(meta(8, 4, 3), meta(3, dtype=torch.int64), **options)


def launch_group_pass(objective, *, tokens=512, packed=False, K=2, per_token=True):
    """256 sequences of a number of tokens each, or of sequence log-probabilities (0); K = 0 for ragged groups."""
    from rpo_kernels.kernels.preference import preference_forward

    S, N = 256, 256 * max(tokens, 1)
    offsets = meta(S + 1, dtype=torch.int32)
    R = 0 if objective.reference == "none" else 1 if objective.reference == "single" else 3
    preference_forward(
        meta(N), objective, labels=meta(N, dtype=torch.int64) if tokens else None, ignore_index=-100, sequences=S,
        group_size=K or 2, lengths=None if tokens else offsets[1:], cu_seqlens=offsets if packed else None,
        cu_groups=None if K else offsets[:101], ref_logps=meta(R, N if per_token else S) if R else None,
        ref_per_token=per_token and R > 0, ref_weights=meta(R, S // K if K else 100) if R > 1 else None,
        rewards=meta(S) if objective.uses_rewards else None, normalizer=meta() if packed else None, sft_share=None, mean=True,
    )  # fmt: skip


def launch_scale(dtype):
    from rpo_kernels.kernels.scaling import scale

    scale(meta(V, 4096, dtype=dtype), meta())


def variants(full):
    """Name and launcher of every variant to compile."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if full else (torch.bfloat16, torch.float32)
    for dtype, softcap, entropy in itertools.product(dtypes, (False, True), (False, True)):
        if full or softcap == entropy:
            name = f"vocabulary {str(dtype)[6:]}{' softcap' * softcap}{' entropy' * entropy}"
            yield name, lambda a=(dtype, softcap, entropy): launch_vocabulary(*a)
    yield "shards", lambda: launch_shards(torch.bfloat16, V // 8)
    yield "scale", lambda: launch_scale(torch.bfloat16)
    harmonic = RPOObjective("backward_kl", reference="harmonic", **EVERYTHING)
    group_passes = {"rows harmonic": (harmonic, {})}
    if full:
        layouts = itertools.cycle([{}, {"packed": True, "K": 0}, {"K": 8, "tokens": 16}])
        for (distance, comparison), layout in zip(FAMILY, layouts):
            group_passes[f"{distance} {comparison}"] = RPOObjective(distance, comparison=comparison), layout
        group_passes["label"] = RPOObjective.robust_dpo(), {}
        group_passes["softmax"] = RPOObjective.nca(), {"K": 0, "tokens": 4096, "per_token": False}
        group_passes["packed ragged harmonic"] = harmonic, {"packed": True, "K": 0}
        geometric = RPOObjective("forward_kl", reference="geometric", **EVERYTHING)
        group_passes["sequences geometric"] = geometric, {"tokens": 0, "per_token": False, "K": 4}
    for name, (objective, layout) in group_passes.items():
        yield f"group pass {name}", lambda a=objective, k=layout: launch_group_pass(a, **k)


def main(name):
    """Compile the variants for one chip, and print what they need as JSON."""
    from triton.backends.compiler import GPUTarget

    from rpo_kernels.offline import recorded_launches

    target = GPUTarget(*TARGETS[name])
    rows = []

    def compile(label, launch, **options):
        code = launch.compile(target, **options)
        accesses = [[kind, width, n] for (kind, width), n in sorted(code.loop_accesses.items())]
        rows.append({"name": label, "registers": code.registers, "local_bytes": code.local_bytes, "accesses": accesses})
        if name == IN_FULL and "rows harmonic" in label:
            rows[-1]["spill_instructions"] = len(re.findall(r"\b(?:LDL|STL)\b", code.asm["sass"]))

    heaviest = None
    for label, run in variants(name == IN_FULL):
        with recorded_launches() as launches:
            run()
        for launch in launches:
            compile(f"{launch.kernel.__name__}: {label}", launch)
            heaviest = launch if "rows harmonic" in label else heaviest
    # Controls: starved of registers a kernel must show spills, and with rows off 16 bytes, narrow accesses.
    starve = {"maxnreg": 64} if target.backend == "cuda" else {"waves_per_eu": 8}
    compile("control: rows harmonic, starved", heaviest, **starve)
    with recorded_launches() as launches:
        launch_vocabulary(torch.bfloat16, False, False, V=50_257)
    compile("control: odd rows", launches[0])
    print(json.dumps(rows))


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_fit_into_registers_and_move_logits_by_sixteen_bytes(name, tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_compile", name], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, starved, odd = json.loads(done.stdout.splitlines()[-1])
    assert starved["local_bytes"] > SOME_REGISTERS, starved
    assert [access[:2] for access in odd["accesses"]] == [["load", 2]], odd
    assert len(rows) == (12 * 2 + 2 + 1 + 14 if name == IN_FULL else 4 * 2 + 2 + 1 + 1)
    for row in rows:
        if "combine" in row["name"]:  # twelve numbers a row: their width does not matter
            assert row["local_bytes"] == 0, row
        elif "group pass" not in row["name"]:
            moves = [["load", 16]] if "forward" in row["name"] else [["load", 16], ["store", 16]]
            assert [access[:2] for access in row["accesses"]] == moves, row
            assert row["local_bytes"] == 0, row
        else:
            assert row["local_bytes"] <= SOME_REGISTERS, row
    for row in [*rows, starved]:  # what the tool calls stack is what the code does
        assert bool(row.get("spill_instructions", row["local_bytes"])) == bool(row["local_bytes"]), row


if __name__ == "__main__":
    main(sys.argv[1])
