"""Cases of the benchmark: parts of the loss head, on the shapes of real models.

A case is a part of the head, a model, a number of rows and the share of them that is scored. Rows
are `[S, T]`: eight responses, each with a prompt that is not scored and T * share scored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rpo_kernels import RPOObjective

SEQUENCES = 8


@dataclass(frozen=True)
class Model:
    name: str
    H: int
    V: int


@dataclass(frozen=True)
class Part:
    """A part of the loss head, from inputs to outputs, and its minimal cost."""

    name: str
    start: str  # "logits" or "hidden"
    trains: tuple[str, ...]  # inputs that need gradients
    # responses per loss; 0: token log-probabilities, with an upstream gradient per token
    group_size: int = 0

    @property
    def gemms(self) -> int:
        """GEMMs of the scored rows with the head: logits, and one for each gradient."""
        return 0 if self.start == "logits" else 1 + len(self.trains)


PARTS = (
    Part("logits forward", "logits", ()),
    Part("logits forward + backward", "logits", ("logits",)),
    Part("linear no grad", "hidden", ()),
    Part("linear frozen head", "hidden", ("hidden",)),
    Part("linear trainable head", "hidden", ("hidden", "weight")),
    Part("pair loss", "hidden", ("hidden", "weight"), group_size=2),
    Part("loss of 8 responses", "hidden", ("hidden", "weight"), group_size=8),
)
QWEN = Model("Qwen3", 4096, 151_936)
MODELS = (
    QWEN,
    Model("Llama-3", 4096, 128_256),
    Model("Gemma-3", 2560, 262_144),
    Model("SmolLM2", 576, 49_152),
)
TINY = Model("tiny", 64, 1_000)


@dataclass(frozen=True)
class Case:
    part: Part
    model: Model
    rows: int
    share: float = 1.0
    dtype: torch.dtype = torch.bfloat16

    @property
    def id(self) -> str:
        return (
            f"{self.part.name}, {self.model.name}, N {self.rows}, {self.share:.0%}, "
            f"{str(self.dtype)[6:]}"
        )

    @property
    def length(self) -> int:
        return self.rows // SEQUENCES

    @property
    def scored(self) -> int:
        """Number of scored rows in all sequences."""
        return SEQUENCES * max(1, round(self.length * self.share))

    @property
    def flop(self) -> int:
        """Necessary flop of the GEMMs: none for rows that are not scored, none twice."""
        return self.part.gemms * 2 * self.scored * self.model.H * self.model.V

    @property
    def bytes(self) -> int:
        """Bytes of logits moved: scored rows are read twice, gradients of all rows are written."""
        if self.part.start != "logits":
            return 0
        row = self.model.V * self.dtype.itemsize
        return self.scored * row + ((self.scored + self.rows) * row if self.part.trains else 0)

    @property
    def input_bytes(self) -> int:
        elements = (
            self.rows * self.model.V
            if self.part.start == "logits"
            else (self.rows + self.model.V) * self.model.H
        )
        return elements * self.dtype.itemsize

    @property
    def beta(self) -> float:
        """So small that sums over many random tokens do not saturate a loss."""
        return 0.1 * (self.scored / SEQUENCES) ** -0.5

    @property
    def objective(self) -> RPOObjective:
        return (
            RPOObjective.dpo(self.beta)
            if self.part.group_size == 2
            else RPOObjective("backward_kl", self.beta)
        )

    def inputs(self, device: str, seed: int = 0) -> Inputs:
        """Make inputs like a language model's: some labels are certain, some are surprises."""
        g = torch.Generator(device).manual_seed(seed)
        S, T, V, H = SEQUENCES, self.length, self.model.V, self.model.H
        random = lambda *shape, dtype=torch.float32: torch.randn(
            shape, generator=g, device=device, dtype=dtype
        )
        targets = torch.randint(0, V, (S, T), generator=g, device=device)
        # by how much a label's logit exceeds the others
        boost = 30 * torch.rand(S, T, 1, generator=g, device=device)
        labels = targets.clone()
        labels[:, : T - self.scored // S] = -100
        logits = hidden = weight = None
        if self.part.start == "logits":
            logits = random(S, T, V, dtype=self.dtype).mul_(2.5)
            logits.scatter_add_(-1, targets[..., None], boost.to(self.dtype))
        else:
            weight = random(V, H, dtype=self.dtype).mul_(2.5 * H**-0.5)
            toward = torch.nn.functional.normalize(weight[targets].float(), dim=-1)
            hidden = (random(S, T, H) + boost / 2.5 * toward).to(self.dtype)
        return Inputs(labels, random(S, T), random(S), logits, hidden, weight)


@dataclass(frozen=True)
class Inputs:
    labels: Tensor  # [S, T] int64, -100 where not scored
    upstream: Tensor  # [S, T] fp32, dL/dlogps for parts without a loss
    rewards: Tensor  # [S] fp32
    logits: Tensor | None = None  # [S, T, V]
    hidden: Tensor | None = None  # [S, T, H]
    weight: Tensor | None = None  # [V, H]

    def ordered(self, order: Tensor) -> Inputs:
        """Return the inputs with the sequences in another order."""
        move = lambda x: None if x is None else x.detach()[order]
        by_sequence = {
            name: move(getattr(self, name))
            for name in ("labels", "upstream", "rewards", "logits", "hidden")
        }
        return replace(self, **by_sequence)


def full() -> list[Case]:
    """Return all cases, the most informative first, because a run may be interrupted.

    These are one model at 8,192 rows with all parts, its other sizes, and other models.
    """
    at = [(QWEN, 8192, 1.0), (QWEN, 8192, 0.3)]
    at += [(QWEN, rows, 1.0) for rows in (2048, 4096, 16_384, 32_768)]
    at += [(model, 8192, share) for model in MODELS[1:] for share in (1.0, 0.3)]
    return [Case(part, model, rows, share) for model, rows, share in at for part in PARTS]


def smoke() -> list[Case]:
    """Return every part at sizes that only show that it runs; bf16 is slow on many CPUs."""
    at = [(128, 1.0, torch.float32), (256, 0.3, torch.bfloat16)]
    return [Case(part, TINY, *size) for size in at for part in PARTS]
