"""What to optimise: one frozen description of a preference objective, and the published methods as
presets of it.

An objective says how the implicit rewards of a group of K responses are compared with their
targets:

    s_i = a_i (l_i - lref_i) - margin [i chosen]     a_i = beta, or beta / n_i under ``average``
    t_i = eta r*_i                                   or a target of the objective's own
    L_g = scale * D[s || t] + sft_weight * NLL(chosen)

Reward-aware Preference Optimization, arXiv 2502.00203. *Naming trap*: RPO's **backward** KL is
KL(target || policy), the one that contains DPO; most of the reinforcement-learning literature calls
that direction *forward*.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import ClassVar, NamedTuple


class Distance(NamedTuple):
    """Rules of a distance. Its formulas stand under its name in ``reference``, and in the
    ``distances`` of each backend as functions whose names begin with its own."""

    code: int  # in kernels
    softmax: bool  # listwise: between the softmaxes of s and t; otherwise over all pairs of gaps
    infinite_targets: bool = False  # whether they are legal: a hard label
    cross_entropy: bool = False  # whether it may be reported as one, and take labels of pairs


DISTANCES = {
    "squared": Distance(0, softmax=False),
    "backward_kl": Distance(1, softmax=True, infinite_targets=True, cross_entropy=True),
    "forward_kl": Distance(2, softmax=True),
    "hellinger": Distance(3, softmax=True, infinite_targets=True),
}
COMPARISONS = ("listwise", "pairwise", "pointwise")
REFERENCES = ("single", "none", "harmonic", "geometric")
SFT_NORMALIZERS = ("sum", "mean", "tokens")
TARGETS = ("rewards", "softmax")


@dataclass(frozen=True)
class RPOObjective:
    """A distance between implicit reward gaps and target reward gaps, for groups of K responses to
    one prompt.

    =========== ========================== ================================ ==================
    distance    listwise                   pairwise (mean over i < j)       pointwise (mean)
    =========== ========================== ================================ ==================
    squared     1/2 mean_i (K/(K-1) v_i)^2 1/2 (u_i - u_j)^2                1/2 u_i^2
    backward_kl KL(q || p)                 KL(B(t_i - t_j) || B(s_i - s_j)) KL(B(t_i) || B(s_i))
    forward_kl  KL(p || q)                 KL(B(s_i - s_j) || B(t_i - t_j)) KL(B(s_i) || B(t_i))
    hellinger   H(p, q)                    H(B(s_i - s_j), B(t_i - t_j))    H(B(s_i), B(t_i))
    =========== ========================== ================================ ==================

    with p = softmax(s), q = softmax(t), u = s - t, v = u less its mean over the group, B(x) the
    Bernoulli distribution of sigmoid(x), and H(p, q) = 2 sum (sqrt p - sqrt q)^2: the squared
    Hellinger distance in the normalisation of Amari's alpha-divergences, half-way between the two
    KL divergences, of which it shares the second order. It is bounded by 4, and its slope vanishes
    for pairs that the policy gets hopelessly wrong: robust to wrong labels. For K = 2 listwise and
    pairwise agree. The *chosen* response of a group is the one with the largest target, the first
    of these when tied; without rewards it is the first response.

    Args:
        distance: ``"squared"``, ``"backward_kl"``, ``"forward_kl"`` or ``"hellinger"``.
        beta: implicit reward units per nat, > 0.
        eta: target units per unit of the explicit rewards, > 0.
        comparison: ``"listwise"``, ``"pairwise"`` or ``"pointwise"``.
        average: divide a sequence's log-ratio by its own number of scored tokens.
        margin: subtracted from the implicit reward of the chosen response (SimPO's gamma), in
            reward units.
        sft_weight: weight >= 0 of the negative log-likelihood of the chosen response, in nats.
        sft_normalizer: that likelihood is the ``"sum"`` over the response's tokens, their
            ``"mean"``, or the mean over the scored ``"tokens"`` of all chosen responses of the
            batch.
        target: ``"rewards"`` for t = eta r*; a number for an objective with its own target, t =
            +target/2 for the chosen response and -target/2 for the others, so that the gap is
            ``target`` >= 0 (may be ``inf``: a hard label); ``"softmax"`` (pointwise) for t_i =
            log(K q_i) with weights 1 + K q_i, q = softmax(eta r*), as NCA has it.
        label: for pairs, the probability q >= 1/2 that the first response is the better one, in
            place of a target. Values above 1 are legal under ``cross_entropy`` (robust DPO).
        cross_entropy: report backward KL as the cross-entropy H(q, p) = KL(q || p) + H(q). The
            gradient is the same; the published losses of the DPO family print this form.
        scale: factor on the distance (published = scale x RPO).
        leave_one_out: for squared listwise. False gives 1/2 Var(u), unbiased: (K-1)/K of the
            default.
        reference: ``"single"``; ``"none"`` for reference-free objectives (lref = 0); or several
            references, of which ``"harmonic"`` is lref = -logsumexp_k(log alpha_k - lref_k) (MRPO,
            arXiv 2405.16388) and ``"geometric"`` is lref = sum_k alpha_k lref_k.

    Raises:
        ValueError: for an unknown name, or a number outside its range.
    """

    distance: str = "backward_kl"
    beta: float = 0.1
    eta: float = 1.0
    comparison: str = "listwise"
    average: bool = False
    margin: float = 0.0
    sft_weight: float = 0.0
    sft_normalizer: str = field(default="sum", kw_only=True)
    target: str | float = field(default="rewards", kw_only=True)
    label: float | None = field(default=None, kw_only=True)
    cross_entropy: bool = field(default=False, kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    leave_one_out: bool = field(default=True, kw_only=True)
    reference: str = field(default="single", kw_only=True)
    spec: ClassVar[str]  # no field: made of them, for each object

    def __post_init__(self) -> None:
        _one_of("distance", self.distance, tuple(DISTANCES))
        _one_of("comparison", self.comparison, COMPARISONS)
        _one_of("sft_normalizer", self.sft_normalizer, SFT_NORMALIZERS)
        _one_of("reference", self.reference, REFERENCES)
        _number("beta", self.beta, low=0.0, strict=True)
        _number("eta", self.eta, low=0.0, strict=True)
        _number("scale", self.scale, low=0.0, strict=True)
        _number("sft_weight", self.sft_weight, low=0.0)
        _number("margin", self.margin)
        for name in ("average", "cross_entropy", "leave_one_out"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"RPOObjective: `{name}` must be True or False, got {getattr(self, name)!r}"
                )
        self._check_target()
        # The objective as one string, for operators that take only plain types. Inverse: from_spec.
        object.__setattr__(self, "spec", json.dumps(asdict(self)))
        if self.cross_entropy and not self.rules.cross_entropy:
            raise ValueError(
                "RPOObjective: `cross_entropy` is a form of distance 'backward_kl' (RPO's backward "
                f"KL is KL(target || policy)), got distance {self.distance!r}"
            )
        if not self.leave_one_out and (self.distance, self.comparison) != ("squared", "listwise"):
            raise ValueError(
                "RPOObjective: `leave_one_out=False` belongs to distance 'squared' with comparison "
                f"'listwise', got {self.distance!r} with {self.comparison!r}"
            )

    def _check_target(self) -> None:
        if isinstance(self.target, str):
            _one_of("target", self.target, TARGETS)
            if self.target == "softmax" and (self.distance, self.comparison) != (
                "backward_kl",
                "pointwise",
            ):
                raise ValueError(
                    "RPOObjective: `target='softmax'` belongs to distance 'backward_kl' with "
                    f"comparison 'pointwise', got {self.distance!r} with {self.comparison!r}"
                )
        else:
            _number("target", self.target, low=0.0, infinite=self.rules.infinite_targets)
        if self.label is None:
            return
        _number("label", self.label, low=0.5)
        if (
            not self.rules.cross_entropy
            or self.comparison == "pointwise"
            or self.target != "rewards"
        ):
            raise ValueError(
                "RPOObjective: `label` is a pair's target under distance 'backward_kl', in place "
                f"of `target`; got distance {self.distance!r}, comparison {self.comparison!r}, "
                f"target {self.target!r}"
            )
        if self.label > 1.0 and not self.cross_entropy:
            raise ValueError(
                f"RPOObjective: `label` must be at most 1 for a KL divergence, got {self.label}; "
                "pass cross_entropy=True"
            )

    @property
    def rules(self) -> Distance:
        """Those of its distance."""
        return DISTANCES[self.distance]

    @property
    def uses_rewards(self) -> bool:
        """Whether the loss functions need explicit ``rewards``; otherwise the first response of a
        group is the chosen one.
        """
        return self.label is None and isinstance(self.target, str)

    @property
    def needs_lengths(self) -> bool:
        """Whether token counts enter the loss."""
        return self.average or (self.sft_weight > 0 and self.sft_normalizer != "sum")

    @property
    def label_gap(self) -> float:
        """The target gap log(q / (1 - q)) that ``label`` stands for; NaN above 1."""
        q = self.label
        if q is None or q > 1.0:
            return math.nan
        return math.inf if q == 1.0 else math.log(q / (1 - q))

    @staticmethod
    @lru_cache(maxsize=256)
    def from_spec(spec: str) -> RPOObjective:
        """The objective that ``spec`` describes."""
        return RPOObjective(**json.loads(spec))

    # ---- presets: each equals the published loss in value (rloo: in gradient) --------------------

    @classmethod
    def dpo(cls, beta: float = 0.1, label_smoothing: float = 0.0) -> RPOObjective:
        """DPO (arXiv 2305.18290): -log sigmoid(d). With label smoothing 0 < eps < 1/2, cDPO:
        -(1 - eps) log sigmoid(d) - eps log sigmoid(-d)."""
        return cls("backward_kl", beta, target=_log_odds(label_smoothing), cross_entropy=True)

    @classmethod
    def robust_dpo(cls, beta: float = 0.1, label_smoothing: float = 0.1) -> RPOObjective:
        """Robust DPO (arXiv 2403.00409): (-(1-eps) log sigmoid(d) + eps log sigmoid(-d)) / (1 - 2
        eps), 0 <= eps < 1/2.
        """
        _number("label_smoothing", label_smoothing, low=0.0, high=0.5)
        label = (1 - label_smoothing) / (1 - 2 * label_smoothing)
        return cls("backward_kl", beta, label=label, cross_entropy=True)

    @classmethod
    def ipo(cls, tau: float = 0.1, average: bool = False) -> RPOObjective:
        """IPO (arXiv 2310.12036): (h - 1/(2 tau))^2 with h the log-ratio gap, of sums (paper) or of
        length averages (TRL).
        """
        _number("tau", tau, low=0.0, strict=True)
        return cls("squared", 1.0, average=average, target=1 / (2 * tau), scale=2.0)

    @classmethod
    def simpo(cls, beta: float = 2.0, gamma: float = 1.0) -> RPOObjective:
        """SimPO (arXiv 2405.14734): -log sigmoid(beta (l_1/n_1 - l_2/n_2) - gamma), no
        reference.
        """
        return cls(
            "backward_kl",
            beta,
            average=True,
            margin=gamma,
            target=math.inf,
            cross_entropy=True,
            reference="none",
        )

    @classmethod
    def cpo(cls, beta: float = 0.1, sft_weight: float = 1.0) -> RPOObjective:
        """CPO (arXiv 2401.08417): -log sigmoid(beta (l_1 - l_2)) + weight x mean NLL of the chosen
        tokens, no reference.
        """
        return cls(
            "backward_kl",
            beta,
            sft_weight=sft_weight,
            sft_normalizer="tokens",
            target=math.inf,
            cross_entropy=True,
            reference="none",
        )

    @classmethod
    def distill_dpo(cls, beta: float = 0.1) -> RPOObjective:
        """Distilled DPO (arXiv 2405.19316): (beta h - (r_1 - r_2))^2."""
        return cls("squared", beta, scale=2.0)

    @classmethod
    def rebel(cls, eta: float = 1.0) -> RPOObjective:
        """REBEL (arXiv 2404.16767): (h / eta - (r_1 - r_2))^2; the reference is the previous
        policy.
        """
        _number("eta", eta, low=0.0, strict=True)
        return cls("squared", 1 / eta, scale=2.0)

    @classmethod
    def exo(cls, beta: float = 0.1, label_smoothing: float = 1e-3) -> RPOObjective:
        """EXO-pref (arXiv 2402.00856): KL(B(sigmoid(d)) || B(1 - eps)), 0 < eps < 1/2."""
        _number("label_smoothing", label_smoothing, low=0.0, high=0.5, strict=True)
        return cls("forward_kl", beta, target=_log_odds(label_smoothing))

    @classmethod
    def softmax_dpo(cls, beta: float = 0.1) -> RPOObjective:
        """Softmax-DPO (arXiv 2406.09215): -log softmax(s)_1 over K responses, the first one
        chosen.
        """
        return cls("backward_kl", beta, target=math.inf, cross_entropy=True)

    @classmethod
    def infonca(cls, beta: float = 0.1, alpha: float = 1.0) -> RPOObjective:
        """InfoNCA (arXiv 2402.05369): -sum_i softmax(r / alpha)_i log softmax(s)_i."""
        _number("alpha", alpha, low=0.0, strict=True)
        return cls("backward_kl", beta, eta=1 / alpha, cross_entropy=True)

    @classmethod
    def rloo(cls, beta: float = 0.1) -> RPOObjective:
        """REINFORCE leave-one-out with the KL in the reward (arXiv 2402.14740), in gradient, on
        policy:
        -(1/K) sum_i A_i l_i with A_i the leave-one-out advantage of r_i - beta (l_i - lref_i)."""
        _number("beta", beta, low=0.0, strict=True)
        return cls("squared", beta, scale=1 / beta, leave_one_out=False)

    @classmethod
    def gvpo(cls, beta: float = 0.1) -> RPOObjective:
        """GVPO (arXiv 2504.19599): 1/2 Var_unbiased(s - r) over the group."""
        return cls("squared", beta, leave_one_out=False)

    @classmethod
    def sppo(cls, beta: float = 1e-3) -> RPOObjective:
        """SPPO, hard labels (arXiv 2405.00675): (h_1 - 1/(2 beta))^2 + (h_2 + 1/(2 beta))^2, h_i =
        l_i - lref_i.
        """
        _number("beta", beta, low=0.0, strict=True)
        return cls("squared", beta, comparison="pointwise", target=1.0, scale=4 / beta / beta)

    @classmethod
    def nca(cls, beta: float = 0.1, alpha: float = 1.0) -> RPOObjective:
        """NCA (arXiv 2402.05369): -sum_i [softmax(r / alpha)_i log sigmoid(s_i) + 1/K log
        sigmoid(-s_i)].
        """
        _number("alpha", alpha, low=0.0, strict=True)
        return cls(
            "backward_kl",
            beta,
            eta=1 / alpha,
            comparison="pointwise",
            target="softmax",
            cross_entropy=True,
        )

    @classmethod
    def bco(cls, beta: float = 0.1) -> RPOObjective:
        """BCO on pairs with reward shift 0 (arXiv 2404.04656): -log sigmoid(s_1) - log
        sigmoid(-s_2).
        """
        return cls(
            "backward_kl",
            beta,
            comparison="pointwise",
            target=math.inf,
            cross_entropy=True,
            scale=2.0,
        )


# Names of the methods that build a published loss.
PRESETS = tuple(name for name, x in vars(RPOObjective).items() if isinstance(x, classmethod))


def _log_odds(label_smoothing: float) -> float:
    _number("label_smoothing", label_smoothing, low=0.0, high=0.5)
    return math.inf if label_smoothing == 0 else math.log((1 - label_smoothing) / label_smoothing)


def _one_of(name: str, value: object, valid: Sequence[str]) -> None:
    if value not in valid:
        hint = ""
        if name == "distance" and value in PRESETS:
            hint = f"; did you mean RPOObjective.{value}()?"
        elif name == "distance" and isinstance(value, float):
            hint = f"; did you mean beta={value!r}?"
        raise ValueError(
            f"RPOObjective: `{name}` must be one of {', '.join(map(repr, valid))}; got "
            f"{value!r}{hint}"
        )


def _number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    strict: bool = False,
    infinite: bool = False,
) -> None:
    """A real number in [low, high), or in (low, high) when strict; finite unless said otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"RPOObjective: `{name}` must be a number, got {value!r}")
    inside = (value > low if strict else value >= low) and (value < high or high == math.inf)
    if math.isnan(value) or not inside or (math.isinf(value) and not infinite):
        kind = "a number" if infinite else "a finite number"
        bound = f" {'>' if strict else '>='} {low:g}" if low > -math.inf else ""
        bound += f"{' and' if bound else ''} < {high:g}" if high < math.inf else ""
        raise ValueError(f"RPOObjective: `{name}` must be {kind}{bound}, got {value!r}")
