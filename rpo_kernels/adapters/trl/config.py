"""Arguments of `RPOTrainer`: TRL's for DPO, with an objective in place of a loss type."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from trl import DPOConfig

from rpo_kernels import RPOObjective
from rpo_kernels.objectives import DISTANCES, PRESETS
from rpo_kernels.sums import Objective, ObjectiveSum

OTHERS = "trl.DPOTrainer under accelerate_trl(), for a loss that is no RPO objective"
# options of DPO that an objective replaces, and their equivalents
REPLACED = {
    "label_smoothing": 'objective={"preset": "dpo", "label_smoothing": ...} (cDPO), "robust_dpo" '
    'or "exo"',
    "loss_weights": 'objective=[[0.8, "dpo"], [0.2, "bco"]] for a weighted sum',
    "ld_alpha": f"{OTHERS} (LD-DPO), or an objective's `average` to divide by lengths",
    "use_weighting": f"{OTHERS} (WPO)",
    "f_divergence_type": f"{OTHERS} (f-DPO)",
    "f_alpha_divergence_coef": f"{OTHERS} (f-DPO)",
    "discopop_tau": f"{OTHERS} (DiscoPOP)",
}


@dataclass
class RPOConfig(DPOConfig):
    """`trl.DPOConfig` with `objective` in place of `loss_type`.

    Args:
        objective: an `rpo_kernels.RPOObjective`; or, for command lines and files, the name of a
            distance (`squared`, `backward_kl`, ...) or of a preset (`dpo`, `ipo`, `simpo`, `rloo`,
            ...); or a dict: the objective's fields, or `{"preset": NAME, ...}` with the preset's
            parameters; or pairs `[weight, objective]` of these for a weighted sum. Dicts and lists
            may be strings in JSON. Stored as a dict of all fields, or as pairs of such dicts.
        beta: the objective's beta, if `objective` does not contain it: units of implicit reward per
            nat. In a sum it is that of the parts that contain none.
        padding_free: concatenate the responses of a batch in one row, without padding. Losses and
            gradients are the same, and fewer rows go through the model. Needs attention for packed
            sequences (FlashAttention) to be fast; other kinds compute a masked square.

    Raises:
        ValueError, TypeError: for an unknown objective, a `beta` that contradicts it, or options of
            DPO that an objective replaces (`loss_type`, `label_smoothing`, `loss_weights`,
            `ld_alpha`, `use_weighting`, `f_divergence_type`, `f_alpha_divergence_coef`,
            `discopop_tau`).
    """

    _VALID_DICT_FIELDS = [*DPOConfig._VALID_DICT_FIELDS, "objective"]  # noqa: RUF012

    objective: dict | str | list | None = field(
        default="backward_kl",
        metadata={
            "help": "Name of a distance or a preset, or JSON: an objective's fields, or a preset "
            'and its parameters, such as {"preset": "simpo", "gamma": 1.0}, or a weighted sum, '
            'such as [[0.8, "dpo"], [0.2, "bco"]].'
        },
    )
    beta: float | None = field(  # type: ignore[assignment]  # None: that of `objective`
        default=None,
        metadata={"help": "Implicit reward units per nat, where `objective` does not say it."},
    )
    loss_type: list[str] | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Must stay unset: `objective` says which loss is meant."}
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "Put the responses of a batch end to end in one row, without padding."},
    )

    def __post_init__(self) -> None:
        # ["rpo"] is set below, and read back from a saved configuration
        if self.loss_type not in (None, "rpo", ["rpo"]):
            raise ValueError(
                f"RPOConfig: `loss_type` must stay unset, got {self.loss_type!r} with `objective` "
                f'{self.objective!r}: the objective is the loss. For "sigmoid" pass '
                'objective="dpo", for "ipo" {"preset": "ipo", "tau": ..., "average": true}'
            )
        for name, instead in REPLACED.items():
            default = next(
                f.default for f in DPOConfig.__dataclass_fields__.values() if f.name == name
            )
            if getattr(self, name) != default:
                raise ValueError(
                    f"RPOConfig: `{name}` has no effect with an objective, got "
                    f"{getattr(self, name)!r}; use {instead}"
                )
        objective = read_objective(self.objective, self.beta)
        self.objective, self.loss_type = written(objective), ["rpo"]
        self.beta = objective.parts[0].beta
        super().__post_init__()
        if self.padding_free and self.pad_to_multiple_of is not None:
            raise ValueError(
                f"RPOConfig: `pad_to_multiple_of` {self.pad_to_multiple_of!r} pads, and "
                "`padding_free` does not; leave one of them out"
            )

    def make_objective(self) -> Objective:
        """Return the objective that `objective` and `beta` describe."""
        return read_objective(self.objective, self.beta)


def written(objective: Objective) -> dict | list:
    """Return an objective in the form that files hold."""
    if isinstance(objective, RPOObjective):
        return asdict(objective)
    return [[w, asdict(part)] for w, part in zip(objective.weights, objective.parts)]


def read_objective(description: Any, beta: float | None = None) -> Objective:
    """Make an objective from any of the forms that `RPOConfig` takes."""
    if isinstance(description, str) and description.lstrip()[:1] in ("{", "["):
        try:
            description = json.loads(description)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"RPOConfig: `objective` is not JSON: {error}; got {description!r}"
            ) from None
    if isinstance(description, ObjectiveSum):
        description = written(description)
    if not isinstance(description, (list, tuple)):
        return _read_part(description, beta)
    if not description or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in description
    ):
        raise TypeError(
            "RPOConfig: `objective` must be pairs [weight, objective] for a weighted sum, got "
            f"{description!r}"
        )
    parts = [(weight, _fields_of(part)) for weight, part in description]
    own = [part["beta"] for _, part in parts if "beta" in part]
    # a saved configuration holds the first part's
    if len(own) == len(parts) and beta not in (None, own[0]):
        raise ValueError(
            "RPOConfig: `beta` must be None where every part of `objective` has its own, "
            f"{', '.join(map(str, own))}; got {beta}"
        )
    try:
        return ObjectiveSum.of(
            [(w, _read_part(part, None if "beta" in part else beta)) for w, part in parts]
        )
    except (TypeError, ValueError) as error:
        message = str(error).removeprefix("RPOObjective: ").removeprefix("RPOConfig: ")
        raise type(error)(f"RPOConfig: `objective` is no sum: {message}") from None


def _fields_of(description: RPOObjective | dict | str) -> dict:
    if isinstance(description, RPOObjective):
        return asdict(description)
    if isinstance(description, str):
        return {"distance" if description in DISTANCES else "preset": description}
    if not isinstance(description, dict):
        raise TypeError(
            "RPOConfig: `objective` must be an RPOObjective, a name, a dict, or a list of pairs "
            f"[weight, objective], got {description!r}"
        )
    return dict(description)


def _read_part(description: RPOObjective | dict | str, beta: float | None) -> RPOObjective:
    op, fields = "RPOConfig", _fields_of(description)
    preset = fields.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise ValueError(
            f"{op}: `objective` must name a distance ({', '.join(DISTANCES)}) or a preset "
            f"({', '.join(PRESETS)}); got {preset!r}"
        )
    make = RPOObjective if preset is None else getattr(RPOObjective, preset)
    known = inspect.signature(make).parameters
    if beta is not None and fields.setdefault("beta", beta) != beta:
        raise ValueError(
            f"{op}: `beta` must be the objective's, {fields['beta']}, or None; got {beta}"
        )
    unknown = [name for name in fields if name not in known]
    if unknown:
        has, knows = (", ".join(f"`{name}`" for name in names) for names in (unknown, known))
        raise ValueError(f"{op}: {preset or 'an objective'} has no {has}, only {knows}")
    return make(**fields)
