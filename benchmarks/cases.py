"""Cases of the benchmark: parts of the loss head, on the shapes of real models.

A case is a part of the head, a model, a number of rows and the share of them that is scored. Rows
are `[S, T]`: eight responses, each a prompt that is not scored and then T * share scored tokens;
or responses of real lengths, padded to the longest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rpo_kernels import RPOObjective

SEQUENCES = 8
# Tokens of both responses of a pair, without the prompt; the chosen one has 53 % of them. Of 1,000
# pairs of UltraFeedback (characters / 4.3; mean 553, 90 % below 1,227) 16 quantiles, shuffled.
PAIRS = (404, 1522, 58, 682, 175, 1055, 97, 499, 243, 1242, 24, 583, 130, 947, 314, 793)
KTO_BASELINE = 0.0  # trainers measure it on responses to other prompts, without gradients
SIMPO_MARGIN = 0.5


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
    trains: tuple[str, ...]  # inputs whose gradients are wanted
    # "dpo", "simpo", "kto" or "rpo" (listwise, backward KL); "": token log-probabilities, with an
    # upstream gradient per token
    loss: str = ""
    group_size: int = 1  # responses that share a loss
    entropy: bool = False  # entropies of the rows too; parts with it or with softcap train nothing
    softcap: float | None = None

    @property
    def gemms(self) -> int:
        """GEMMs of the scored rows with the head: logits, and one for each gradient."""
        return 0 if self.start == "logits" else 1 + len(self.trains)


PARTS = (
    Part("logits forward", "logits", ()),
    Part("logits and entropy forward", "logits", (), entropy=True),
    Part("softcapped logits forward", "logits", (), softcap=30.0),
    Part("logits forward + backward", "logits", ("logits",)),
    Part("linear no grad", "hidden", ()),
    Part("linear frozen head", "hidden", ("hidden",)),
    Part("linear trainable head", "hidden", ("hidden", "weight")),
    Part("DPO", "hidden", ("hidden", "weight"), "dpo", 2),
    Part("SimPO", "hidden", ("hidden", "weight"), "simpo", 2),
    Part("KTO", "hidden", ("hidden", "weight"), "kto"),
    Part("RPO of 8 responses", "hidden", ("hidden", "weight"), "rpo", 8),
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
    pairs: tuple[int, ...] = ()  # scored tokens of each pair of responses, if not all the same

    @staticmethod
    def of_pairs(part: Part, model: Model, pairs: tuple[int, ...], **more: torch.dtype) -> Case:
        """Of responses of different lengths, padded at their ends."""
        case = Case(part, model, 0, pairs=pairs, **more)
        rows = case.sequences * max(case.counts)
        return replace(case, rows=rows, share=case.scored / rows)

    @property
    def id(self) -> str:
        return (
            f"{self.part.name}, {self.model.name}, N {self.rows}, {self.share:.0%}, "
            f"{'real lengths, ' if self.pairs else ''}{str(self.dtype)[6:]}"
        )

    @property
    def sequences(self) -> int:
        return len(self.counts)

    @property
    def length(self) -> int:
        """Rows of a sequence."""
        return self.rows // self.sequences

    @property
    def counts(self) -> tuple[int, ...]:
        """Scored rows of each sequence."""
        if self.pairs:
            return tuple(n for p in self.pairs for n in (round(0.53 * p), p - round(0.53 * p)))
        return (max(1, round(self.rows // SEQUENCES * self.share)),) * SEQUENCES

    @property
    def scored(self) -> int:
        """Scored rows, of all sequences."""
        return sum(self.counts)

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
        """So small that sums over many random tokens saturate no loss."""
        tokens = self.scored / self.sequences
        return 0.1 * tokens**-0.5 * (tokens if self.part.loss == "simpo" else 1)

    @property
    def objective(self) -> RPOObjective:
        """Of a part with a loss that is an RPO objective: all but KTO."""
        return {
            "dpo": lambda: RPOObjective.dpo(self.beta),
            "simpo": lambda: RPOObjective.simpo(self.beta, SIMPO_MARGIN),
            "rpo": lambda: RPOObjective("backward_kl", self.beta),
        }[self.part.loss]()

    def inputs(self, device: str, seed: int = 0) -> Inputs:
        """Make inputs like a language model's: some labels are certain, some are surprises."""
        g = torch.Generator(device).manual_seed(seed)
        S, T, V, H = self.sequences, self.length, self.model.V, self.model.H
        random = lambda *shape, dtype=torch.float32: torch.randn(
            shape, generator=g, device=device, dtype=dtype
        )
        targets = torch.randint(0, V, (S, T), generator=g, device=device)
        # by how much a label's logit exceeds the others
        boost = 30 * torch.rand(S, T, 1, generator=g, device=device)
        first = torch.zeros(S) if self.pairs else T - torch.tensor(self.counts)
        at = torch.arange(T) - first[:, None]
        is_scored = (at >= 0) & (at < torch.tensor(self.counts)[:, None])
        labels = targets.masked_fill(~is_scored.to(device), -100)
        logits = hidden = weight = None
        if self.part.start == "logits":
            logits = random(S, T, V, dtype=self.dtype).mul_(2.5)
            logits.scatter_add_(-1, targets[..., None], boost.to(self.dtype))
        else:
            weight = random(V, H, dtype=self.dtype).mul_(2.5 * H**-0.5)
            toward = torch.nn.functional.normalize(weight[targets].float(), dim=-1)
            hidden = (random(S, T, H) + boost / 2.5 * toward).to(self.dtype)
        return Inputs(labels, self.counts, random(S, T), random(S), logits, hidden, weight)


@dataclass(frozen=True)
class Inputs:
    labels: Tensor  # [S, T] int64, -100 where not scored
    counts: tuple[int, ...]  # scored tokens of each sequence: whoever made the batch knows them
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
        counts = tuple(self.counts[i] for i in order.tolist())
        return replace(self, counts=counts, **by_sequence)


LOSSES = [part for part in PARTS if part.loss]


def full() -> list[Case]:
    """Return all cases, the most informative first, because a run may be interrupted.

    These are one model at 8,192 rows with all parts, its other sizes, and other models.
    """
    at = [(QWEN, 8192, 0.3)]
    at += [(QWEN, rows, 1.0) for rows in (2048, 4096, 16_384, 32_768)]
    at += [(model, 8192, share) for model in MODELS[1:] for share in (1.0, 0.3)]
    return [
        *(Case(part, QWEN, 8192) for part in PARTS),
        *(Case.of_pairs(part, QWEN, PAIRS) for part in LOSSES),
        *(Case(part, *size) for size in at for part in PARTS),
    ]


def smoke() -> list[Case]:
    """Return every part at sizes that only show that it runs; bf16 is slow on many CPUs."""
    at = [(128, 1.0, torch.float32), (256, 0.3, torch.bfloat16)]
    pairs = tuple(p // 40 + 2 for p in PAIRS)
    return [
        *(Case(part, TINY, *size) for size in at for part in PARTS),
        *(Case.of_pairs(part, TINY, pairs, dtype=torch.float32) for part in LOSSES),
    ]
