"""Arguments of `RPOTrainer`: TRL's for DPO, with an objective in place of a loss type."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass, field

from trl import DPOConfig

from rpo_kernels import RPOObjective
from rpo_kernels.objectives import DISTANCES, PRESETS

# options of DPO that an objective replaces, and their equivalents
REPLACED = {
    "label_smoothing": 'objective={"preset": "dpo", "label_smoothing": ...} (cDPO), "robust_dpo" '
    'or "exo"',
    "loss_weights": "an objective's `sft_weight` for an added likelihood term; sums of several "
    "losses are not supported",
    "ld_alpha": "an objective's `average` to divide by lengths; LD-DPO is not representable",
    "use_weighting": "nothing: WPO weights are not representable",
    "f_divergence_type": "nothing: f-DPO is nonlinear in the implicit rewards",
    "padding_free": "nothing: TRL 1.16 ignores it (only scored positions reach the LM head all "
    "the same)",
}


@dataclass
class RPOConfig(DPOConfig):
    """`trl.DPOConfig` with `objective` in place of `loss_type`.

    Args:
        objective: an `RPOObjective`; or, for command lines and files, the name of a distance
            (`squared`, `backward_kl`, `forward_kl`) or of a preset (`dpo`, `ipo`, `simpo`, `rloo`,
            ...); or a dict, possibly as a string in JSON: the objective's fields, or
            `{"preset": NAME, ...}` with the preset's parameters. Stored as a dict of all fields.
        beta: the objective's beta, if `objective` does not contain it: units of implicit reward per
            nat.

    Raises:
        ValueError, TypeError: for an unknown objective, a `beta` that contradicts it, options of
            DPO that an objective replaces (`loss_type`, `label_smoothing`, `loss_weights`,
            `ld_alpha`, `use_weighting`, `f_divergence_type`), or options without effect
            (`padding_free`).
    """

    _VALID_DICT_FIELDS = [*DPOConfig._VALID_DICT_FIELDS, "objective"]  # noqa: RUF012

    objective: dict | str | None = field(
        default="backward_kl",
        metadata={
            "help": "Name of a distance or a preset, or JSON: an objective's fields, or a preset "
            "and its parameters, such as "
            '{"preset": "simpo", "gamma": 1.0}.'
        },
    )
    beta: float | None = field(  # type: ignore[assignment]  # None: that of `objective`
        default=None,
        metadata={"help": "Implicit reward units per nat, where `objective` does not say it."},
    )
    loss_type: list[str] | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Must stay unset: `objective` says which loss is meant."}
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
        self.objective, self.beta, self.loss_type = asdict(objective), objective.beta, ["rpo"]
        super().__post_init__()

    def make_objective(self) -> RPOObjective:
        """Return the objective that `objective` and `beta` describe."""
        return read_objective(self.objective, self.beta)


def read_objective(
    description: RPOObjective | dict | str | None, beta: float | None = None
) -> RPOObjective:
    """Make an objective from any of the forms that `RPOConfig` takes."""
    op = "RPOConfig"
    if isinstance(description, RPOObjective):
        description = asdict(description)
    if isinstance(description, str) and description.lstrip().startswith("{"):
        try:
            description = json.loads(description)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{op}: `objective` is not JSON: {error}; got {description!r}"
            ) from None
    if isinstance(description, str):
        description = {"distance" if description in DISTANCES else "preset": description}
    if not isinstance(description, dict):
        raise TypeError(
            f"{op}: `objective` must be an RPOObjective, a name or a dict, got {description!r}"
        )
    fields = dict(description)
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
