"""Preference objectives: one frozen description, and the published methods as presets of it.

An objective compares the implicit rewards of a group of K responses with their targets:

    s_i = a_i (l_i - lref_i) - margin [i chosen]     a_i = beta, or beta / n_i with `average`
    t_i = eta r*_i                                   or a fixed target
    L_g = scale * D[s || t] + sft_weight * NLL(chosen)

Source: Reward-aware Preference Optimization, arXiv 2502.00203. Its **backward** KL is KL(target ||
policy), the one that contains DPO; most of the reinforcement-learning literature calls that
direction *forward*.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import ClassVar, NamedTuple


class Distance(NamedTuple):
    """Rules of a distance.

    Its formulas are in `reference`, and in `distances` of each backend, in functions whose names
    begin with that of the distance.
    """

    code: int  # in the kernels
    softmax: bool  # listwise form: between softmax(s) and softmax(t); otherwise over pairs of gaps
    infinite_targets: bool = False  # whether a target may be infinite: a hard label
    cross_entropy: bool = False  # whether it has a cross-entropy form, and labels of pairs


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
    """Distance between gaps of implicit rewards and of target rewards, for groups of K responses.

        distance    listwise                   pairwise (mean over i < j)       pointwise (mean)
        ----------- -------------------------- -------------------------------- ------------------
        squared     1/2 mean_i (K/(K-1) v_i)^2 1/2 (u_i - u_j)^2                1/2 u_i^2
        backward_kl KL(q || p)                 KL(B(t_i - t_j) || B(s_i - s_j)) KL(B(t_i) || B(s_i))
        forward_kl  KL(p || q)                 KL(B(s_i - s_j) || B(t_i - t_j)) KL(B(s_i) || B(t_i))
        hellinger   H(p, q)                    H(B(s_i - s_j), B(t_i - t_j))    H(B(s_i), B(t_i))

        s_i = a_i (l_i - lref_i) - margin [i chosen],   a_i = beta, or beta / n_i with average
        t_i = eta r*_i, or a fixed target
        p = softmax(s),   q = softmax(t),   u = s - t,   v = u - mean(u)
        B(x): Bernoulli distribution of sigmoid(x)
        H(p, q) = 2 sum (sqrt p - sqrt q)^2

    H is the squared Hellinger distance in the normalisation of Amari's alpha-divergences: half-way
    between the two KL divergences, with which it agrees to second order. It is bounded by 4, and
    its slope vanishes for pairs that the policy gets very wrong, which makes it robust to wrong
    labels. For K = 2, listwise and pairwise are equal. The *chosen* response of a group is the one
    with the largest target (the first of equal ones); without rewards it is the first response.

    Args:
        distance: `"squared"`, `"backward_kl"`, `"forward_kl"` or `"hellinger"`.
        beta: units of implicit reward per nat, > 0.
        eta: units of target per unit of the explicit rewards, > 0.
        comparison: `"listwise"`, `"pairwise"` or `"pointwise"`.
        average: divide a sequence's log-ratio by its number n_i of scored tokens.
        margin: subtracted from the implicit reward of the chosen response (SimPO's gamma), in
            reward units.
        sft_weight: weight >= 0 of the negative log-likelihood of the chosen response, in nats.
        sft_normalizer: reduces that likelihood: the `"sum"` over the response's tokens, their
            `"mean"`, or the mean over the scored `"tokens"` of all chosen responses of the batch.
        target: `"rewards"` for t = eta r*; a number >= 0 for a fixed gap: t = +target/2 for the
            chosen response and -target/2 for the others (may be `inf`: a hard label); `"softmax"`
            (pointwise) for t_i = log(K q_i) with weights 1 + K q_i, q = softmax(eta r*), as in NCA.
        label: for pairs, the probability q >= 1/2 that the first response is the better one, in
            place of a target. Values above 1 need `cross_entropy` (robust DPO).
        cross_entropy: report backward KL as the cross-entropy H(q, p) = KL(q || p) + H(q), as the
            published losses of the DPO family do. The gradient is the same.
        scale: factor on the distance (published loss = scale x RPO).
        leave_one_out: for squared listwise. False gives the unbiased 1/2 Var(u): (K-1)/K of the
            default.
        reference: `"single"`; `"none"` for reference-free objectives (lref = 0); or a combination
            of several: `"harmonic"` for lref = -logsumexp_k(log alpha_k - lref_k) (MRPO, arXiv
            2405.16388), `"geometric"` for lref = sum_k alpha_k lref_k.
        name: what metrics of a sum of objectives call this part; by default its preset's name, or
            its distance.

    Raises:
        ValueError, TypeError: for an unknown name, a value of the wrong type or out of range, or
            settings that do not go together.
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
    name: str = field(default="", kw_only=True, compare=False, repr=False)
    spec: ClassVar[str]  # not a field: derived from the fields

    def __post_init__(self) -> None:
        _one_of("distance", self.distance, tuple(DISTANCES))
        _one_of("comparison", self.comparison, COMPARISONS)
        _one_of("sft_normalizer", self.sft_normalizer, SFT_NORMALIZERS)
        _one_of("reference", self.reference, REFERENCES)
        check_number("beta", self.beta, low=0.0, strict=True)
        check_number("eta", self.eta, low=0.0, strict=True)
        check_number("scale", self.scale, low=0.0, strict=True)
        check_number("sft_weight", self.sft_weight, low=0.0)
        check_number("margin", self.margin)
        for name in ("average", "cross_entropy", "leave_one_out"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"RPOObjective: `{name}` must be True or False, got {getattr(self, name)!r}"
                )
        if not isinstance(self.name, str):
            raise TypeError(f"RPOObjective: `name` must be a string, got {self.name!r}")
        self._check_target()
        # A string, because operators take plain types only; from_spec is the inverse.
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
        elif self.target is None:
            raise TypeError(
                "RPOObjective: `target` must be 'rewards', 'softmax' or a number, got None"
            )
        else:
            check_number("target", self.target, low=0.0, infinite=self.rules.infinite_targets)
        if self.label is None:
            return
        check_number("label", self.label, low=0.5)
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
    def parts(self) -> tuple[RPOObjective, ...]:
        """The objective itself, as a sum of one part."""
        return (self,)

    @property
    def rules(self) -> Distance:
        """The rules of its distance."""
        return DISTANCES[self.distance]

    @property
    def uses_rewards(self) -> bool:
        """Whether the loss needs explicit `rewards`; if not, a group's first response is chosen."""
        return self.label is None and isinstance(self.target, str)

    @property
    def needs_lengths(self) -> bool:
        """Whether the loss depends on numbers of tokens."""
        return self.average or (self.sft_weight > 0 and self.sft_normalizer != "sum")

    @property
    def label_gap(self) -> float:
        """The target gap log(q / (1 - q)) that `label` stands for; NaN above 1."""
        q = self.label
        if q is None or q > 1.0:
            return math.nan
        return math.inf if q == 1.0 else math.log(q / (1 - q))

    @staticmethod
    @lru_cache(maxsize=256)
    def from_spec(spec: str) -> RPOObjective:
        """Return the objective with this `spec`, a string: JSON of its fields."""
        return RPOObjective(**json.loads(spec))

    # ---- presets: each equals the published loss in value (rloo: in gradient) --------------------

    @classmethod
    def dpo(cls, beta: float = 0.1, label_smoothing: float = 0.0) -> RPOObjective:
        """DPO (arXiv 2305.18290), or cDPO with label smoothing 0 < eps < 1/2.

            L = -log sigmoid(d),   cDPO:   -(1 - eps) log sigmoid(d) - eps log sigmoid(-d)

        d = s_1 - s_2.
        """
        return cls(
            "backward_kl", beta, target=_log_odds(label_smoothing), cross_entropy=True, name="dpo"
        )

    @classmethod
    def robust_dpo(cls, beta: float = 0.1, label_smoothing: float = 0.1) -> RPOObjective:
        """Robust DPO (arXiv 2403.00409), 0 <= eps < 1/2.

            L = (-(1 - eps) log sigmoid(d) + eps log sigmoid(-d)) / (1 - 2 eps)

        d = s_1 - s_2.
        """
        check_number("label_smoothing", label_smoothing, low=0.0, high=0.5)
        label = (1 - label_smoothing) / (1 - 2 * label_smoothing)
        return cls("backward_kl", beta, label=label, cross_entropy=True, name="robust_dpo")

    @classmethod
    def ipo(cls, tau: float = 0.1, average: bool = False) -> RPOObjective:
        """IPO (arXiv 2310.12036): (h - 1/(2 tau))^2 for the gap h of log-ratios.

        Log-ratios are sums over tokens (paper), or averages (TRL).
        """
        check_number("tau", tau, low=0.0, strict=True)
        return cls("squared", 1.0, average=average, target=1 / (2 * tau), scale=2.0, name="ipo")

    @classmethod
    def simpo(cls, beta: float = 2.0, gamma: float = 1.0) -> RPOObjective:
        """SimPO (arXiv 2405.14734): -log sigmoid(beta (l_1/n_1 - l_2/n_2) - gamma)."""
        return cls(
            "backward_kl",
            beta,
            average=True,
            margin=gamma,
            target=math.inf,
            cross_entropy=True,
            reference="none",
            name="simpo",
        )

    @classmethod
    def cpo(cls, beta: float = 0.1, sft_weight: float = 1.0) -> RPOObjective:
        """CPO (arXiv 2401.08417), no reference.

            L = -log sigmoid(beta (l_1 - l_2)) + sft_weight * mean NLL of the chosen tokens

        The mean runs over the chosen responses of the batch.
        """
        return cls(
            "backward_kl",
            beta,
            sft_weight=sft_weight,
            sft_normalizer="tokens",
            target=math.inf,
            cross_entropy=True,
            reference="none",
            name="cpo",
        )

    @classmethod
    def distill_dpo(cls, beta: float = 0.1) -> RPOObjective:
        """Distilled DPO (arXiv 2405.19316): (beta h - (r_1 - r_2))^2."""
        return cls("squared", beta, scale=2.0, name="distill_dpo")

    @classmethod
    def rebel(cls, eta: float = 1.0) -> RPOObjective:
        """REBEL (arXiv 2404.16767): (h / eta - (r_1 - r_2))^2, reference = previous policy."""
        check_number("eta", eta, low=0.0, strict=True)
        return cls("squared", 1 / eta, scale=2.0, name="rebel")

    @classmethod
    def exo(cls, beta: float = 0.1, label_smoothing: float = 1e-3) -> RPOObjective:
        """EXO-pref (arXiv 2402.00856): KL(B(sigmoid(d)) || B(1 - eps)), 0 < eps < 1/2."""
        check_number("label_smoothing", label_smoothing, low=0.0, high=0.5, strict=True)
        return cls("forward_kl", beta, target=_log_odds(label_smoothing), name="exo")

    @classmethod
    def softmax_dpo(cls, beta: float = 0.1) -> RPOObjective:
        """Softmax-DPO (arXiv 2406.09215): -log softmax(s)_1 over K responses, the first chosen."""
        return cls("backward_kl", beta, target=math.inf, cross_entropy=True, name="softmax_dpo")

    @classmethod
    def infonca(cls, beta: float = 0.1, alpha: float = 1.0) -> RPOObjective:
        """InfoNCA (arXiv 2402.05369): -sum_i softmax(r / alpha)_i log softmax(s)_i."""
        check_number("alpha", alpha, low=0.0, strict=True)
        return cls("backward_kl", beta, eta=1 / alpha, cross_entropy=True, name="infonca")

    @classmethod
    def rloo(cls, beta: float = 0.1) -> RPOObjective:
        """REINFORCE leave-one-out with the KL in the reward (arXiv 2402.14740).

            L = -(1/K) sum_i A_i l_i

        A_i is the leave-one-out advantage of r_i - beta (l_i - lref_i). Equal in gradient, on
        policy.
        """
        check_number("beta", beta, low=0.0, strict=True)
        return cls("squared", beta, scale=1 / beta, leave_one_out=False, name="rloo")

    @classmethod
    def gvpo(cls, beta: float = 0.1) -> RPOObjective:
        """GVPO (arXiv 2504.19599): 1/2 Var_unbiased(s - r) over the group."""
        return cls("squared", beta, leave_one_out=False, name="gvpo")

    @classmethod
    def sppo(cls, beta: float = 1e-3) -> RPOObjective:
        """SPPO with hard labels (arXiv 2405.00675).

            L = (h_1 - 1/(2 beta))^2 + (h_2 + 1/(2 beta))^2,   h_i = l_i - lref_i

        For pairs, the first response chosen.
        """
        check_number("beta", beta, low=0.0, strict=True)
        return cls(
            "squared", beta, comparison="pointwise", target=1.0, scale=4 / beta / beta, name="sppo"
        )

    @classmethod
    def nca(cls, beta: float = 0.1, alpha: float = 1.0) -> RPOObjective:
        """NCA (arXiv 2402.05369).

            L = -sum_i [softmax(r / alpha)_i log sigmoid(s_i) + 1/K log sigmoid(-s_i)]

        For groups of K responses.
        """
        check_number("alpha", alpha, low=0.0, strict=True)
        return cls(
            "backward_kl",
            beta,
            eta=1 / alpha,
            comparison="pointwise",
            target="softmax",
            cross_entropy=True,
            name="nca",
        )

    @classmethod
    def bco(cls, beta: float = 0.1) -> RPOObjective:
        """BCO on pairs, shift 0 (arXiv 2404.04656): -log sigmoid(s_1) - log sigmoid(-s_2)."""
        return cls(
            "backward_kl",
            beta,
            comparison="pointwise",
            target=math.inf,
            cross_entropy=True,
            scale=2.0,
            name="bco",
        )


# Names of the methods that build a published loss.
PRESETS = tuple(name for name, x in vars(RPOObjective).items() if isinstance(x, classmethod))


def _log_odds(label_smoothing: float) -> float:
    check_number("label_smoothing", label_smoothing, low=0.0, high=0.5)
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


def check_number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    strict: bool = False,
    infinite: bool = False,
) -> None:
    """Check a real number in [low, high), or in (low, high) if strict; finite unless `infinite`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"RPOObjective: `{name}` must be a number, got {value!r}")
    inside = (value > low if strict else value >= low) and (value < high or high == math.inf)
    # without math.isfinite, which torch.compile cannot trace
    if not inside or not (abs(value) <= sys.float_info.max or (infinite and value == math.inf)):
        kind = "a number" if infinite else "a finite number"
        bound = f" {'>' if strict else '>='} {low:g}" if low > -math.inf else ""
        bound += f"{' and' if bound else ''} < {high:g}" if high < math.inf else ""
        raise ValueError(f"RPOObjective: `{name}` must be {kind}{bound}, got {value!r}")
