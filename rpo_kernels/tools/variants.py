"""Kernels as users launch them, by name: what the audit compiles.

Tensors are on the meta device; nothing runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..inputs import Groups, LogitTransform, Sequences
from ..objectives import COMPARISONS, DISTANCES, RPOObjective
from .offline import Launch, recorded_launches

# Vocabularies by the alignment of rows: a row is aligned if each begins at a multiple of 16 bytes,
# which triton knows if the stride is a multiple of 16 elements.
VOCABULARIES = {
    "aligned": 151_936,  # Qwen 3
    # GPT-NeoX, padded to 8: bf16 rows are aligned, but their stride is not a multiple of 16
    "multiple of 8": 50_280,
    "unaligned": 50_257,  # GPT-2
}
EVERYTHING: dict[str, Any] = {
    "average": True,
    "margin": 0.3,
    "sft_weight": 0.2,
    "sft_normalizer": "tokens",
}


@dataclass(frozen=True)
class Variant:
    """A call that launches kernels."""

    name: str
    run: Any
    dtype: torch.dtype = torch.float32  # of what they stream
    V: int = 0  # columns of its rows; 0: no rows

    def launches(self) -> list[Launch]:
        with recorded_launches() as launches:
            self.run()
        return launches

    def streams(self, launch: Launch) -> bool:
        """Return whether the kernel streams rows of the vocabulary, or a gradient.

        Its speed is then that of the memory.
        """
        shapes = [x.shape for x in launch.arguments.values() if isinstance(x, torch.Tensor)]
        return any(self.V and shape and shape[-1] == self.V for shape in shapes)


def variants(full: bool = False) -> Iterator[Variant]:
    """Yield common variants, and those that need the fewest and most registers; or all of them."""
    for dtype, options, (rows, V) in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32),
        itertools.product((False, True), repeat=2),
        VOCABULARIES.items(),
    ):
        softcap, entropy = options
        common = (dtype, options, rows) == (torch.bfloat16, (False, True), "aligned")
        if (
            full
            or common
            or (softcap == entropy and (rows != "multiple of 8" or dtype == torch.bfloat16))
        ):
            name = f"{str(dtype)[6:]}{' softcap' * softcap}{' entropy' * entropy}, {rows}"
            yield Variant(name, partial(launch_vocabulary, dtype, softcap, entropy, V), dtype, V)
    yield Variant(
        "float32 to bfloat16, aligned",
        partial(launch_mixed_backward, VOCABULARIES["aligned"]),
        torch.float32,
        VOCABULARIES["aligned"],
    )
    shard = VOCABULARIES["aligned"] // 8
    yield Variant(
        "bfloat16 softcap entropy shard, aligned",
        partial(launch_shards, torch.bfloat16, shard),
        torch.bfloat16,
        shard,
    )
    yield Variant("bfloat16, aligned", partial(launch_scale, torch.bfloat16), torch.bfloat16, 4096)
    harmonic = RPOObjective("backward_kl", reference="harmonic", **EVERYTHING)
    passes: dict[str, tuple[RPOObjective, dict[str, Any]]] = {
        "pairs": (RPOObjective(), {}),
        "harmonic": (harmonic, {}),
    }
    if full:
        layouts: Iterator[dict[str, Any]] = itertools.cycle(
            [{}, {"packed": True, "K": 0}, {"K": 8, "tokens": 16}]
        )
        for (distance, comparison), layout in zip(
            itertools.product(DISTANCES, COMPARISONS), layouts
        ):
            passes[f"{distance} {comparison}"] = (
                RPOObjective(distance, comparison=comparison),
                layout,
            )
        passes["label"] = RPOObjective.robust_dpo(), {}
        passes["softmax"] = RPOObjective.nca(), {"K": 0, "tokens": 4096, "per_token": False}
        passes["packed ragged harmonic"] = harmonic, {"packed": True, "K": 0}
        geometric = RPOObjective("forward_kl", reference="geometric", **EVERYTHING)
        passes["sequences geometric"] = geometric, {"tokens": 0, "per_token": False, "K": 4}
    for name, (objective, layout) in passes.items():
        yield Variant(name, partial(launch_group_pass, objective, **layout))


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_vocabulary(dtype: torch.dtype, softcap: bool, entropy: bool, V: int) -> None:
    """Launch forward and backward of three rows."""
    from ..kernels.vocabulary_backward import vocabulary_backward
    from ..kernels.vocabulary_forward import vocabulary_forward

    logits, labels = meta(1, 3, V, dtype=dtype), meta(3, dtype=torch.int64)
    transform = LogitTransform(softcap=30.0 if softcap else 0.0)
    vocabulary_forward(logits, labels, transform, entropy)
    entropies = meta(3) if entropy else None
    vocabulary_backward(
        logits,
        labels,
        meta(3),
        meta(2, 3),
        meta(3),
        transform,
        logits,
        entropies=entropies,
        entropy_coef=entropies,
        upstream=meta(),
    )


def launch_mixed_backward(V: int) -> None:
    """What the linear path does with a chunk of fp32 logits: 16-bit gradients beside them."""
    from ..kernels.vocabulary_backward import vocabulary_backward

    logits, labels = meta(1, 3, V), meta(3, dtype=torch.int64)
    out = meta(1, 3, V, dtype=torch.bfloat16)
    vocabulary_backward(logits, labels, meta(3), meta(2, 3), meta(3), LogitTransform(), out)


def launch_shards(dtype: torch.dtype, columns: int) -> None:
    """Launch the statistics of one of eight shards, and their combination, for three rows."""
    from ..kernels.shards import combine
    from ..kernels.vocabulary_forward import shard_statistics

    transform = LogitTransform(softcap=30.0, ignore_index=-2)
    shard_statistics(
        meta(1, 3, columns, dtype=dtype), meta(3, dtype=torch.int64), transform, entropy=True
    )
    combine(meta(8, 4, 3), meta(3, dtype=torch.int64), transform, entropy=True)


def launch_group_pass(
    objective: RPOObjective,
    *,
    tokens: int = 512,
    packed: bool = False,
    K: int = 2,
    per_token: bool = True,
) -> None:
    """Launch the group pass for 256 sequences of `tokens` tokens (0: sequence log-probabilities).

    K is 0 for ragged groups.
    """
    from ..kernels.group_pass import group_pass

    S, N = 256, 256 * max(tokens, 1)
    offsets = meta(S + 1, dtype=torch.int32)
    R = 0 if objective.reference == "none" else 1 if objective.reference == "single" else 3
    groups = Groups(
        objective,
        rewards=meta(S) if objective.uses_rewards else None,
        ref_logps=meta(R, N if per_token else S) if R else None,
        ref_weights=meta(R, S // K if K else 100) if R > 1 else None,
        cu_groups=None if K else offsets[:101],
        normalizer=meta() if packed else None,
        group_size=K or 2,
        mean=True,
        ref_per_token=per_token and R > 0,
    )
    labels, lengths = (meta(N, dtype=torch.int64), None) if tokens else (None, offsets[1:])
    group_pass(meta(N), labels, lengths, Sequences(S, offsets if packed else None), groups, -100)


def launch_scale(dtype: torch.dtype) -> None:
    from ..kernels.scaling import scale

    scale(meta(151_936, 4096, dtype=dtype), meta())
