"""Arguments of :class:`RPOTrainer`: TRL's for DPO, with an objective where they have a loss
type.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass, field

from trl import DPOConfig

from rpo_kernels import RPOObjective
from rpo_kernels.objectives import DISTANCES, PRESETS

# Options of DPO that an objective replaces, and what says the same.
REPLACED = {
    "label_smoothing": 'objective={"preset": "dpo", "label_smoothing": ...} (cDPO), "robust_dpo" '
    'or "exo"',
    "loss_weights": "an objective's `sft_weight` for an added likelihood term; sums of several "
    "losses are not supported",
    "ld_alpha": "an objective's `average` to divide by lengths; LD-DPO is not representable",
    "use_weighting": "nothing: WPO weights are not representable",
    "f_divergence_type": "nothing: f-DPO is nonlinear in the implicit rewards",
}


@dataclass
class RPOConfig(DPOConfig):
    """:class:`trl.DPOConfig` with ``objective`` in place of ``loss_type``.

    Parameters:
        objective: an :class:`rpo_kernels.RPOObjective`; or, from a command line or a file, the name
            of a distance (``squared``, ``backward_kl``, ``forward_kl``) or of a preset (``dpo``,
            ``ipo``, ``simpo``, ``rloo``, ...), or a dict,
            which may be a string in JSON: the objective's fields, or ``{"preset": NAME, ...}`` with
            the preset's parameters. Kept as a dict of all fields.
        beta: the objective's, if it is not part of ``objective``: implicit reward units per nat.
        padding_free: the responses of a batch lie end to end in one row, without padding. Losses
            and gradients are the same; fewer rows go through the model. For attention that takes
            packed sequences (FlashAttention); others compute its whole square, masked.

    Raises:
        ValueError, TypeError: for an unknown objective, for a ``beta`` that contradicts it, and for
            DPO's options that an objective replaces (``loss_type``, ``label_smoothing``,
            ``loss_weights``, ``ld_alpha``, ``use_weighting``, ``f_divergence_type``).
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
    beta: float | None = field(  # type: ignore[assignment]  # None: as `objective` says
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
        # ["rpo"] is what this method leaves behind, and comes back with a saved configuration
        if self.loss_type not in (None, "rpo", ["rpo"]):
            raise ValueError(
                f"RPOConfig: `loss_type` must stay unset, got {self.loss_type!r} beside "
                f"`objective` {self.objective!r}: the objective is the loss. Say "
                '"sigmoid" as objective="dpo", "ipo" as {"preset": "ipo", "tau": ..., '
                '"average": true}'
            )
        for name, instead in REPLACED.items():
            default = next(
                f.default for f in DPOConfig.__dataclass_fields__.values() if f.name == name
            )
            if getattr(self, name) != default:
                raise ValueError(
                    f"RPOConfig: `{name}` has no effect beside an objective, got "
                    f"{getattr(self, name)!r}; use {instead}"
                )
        objective = read_objective(self.objective, self.beta)
        self.objective, self.beta, self.loss_type = asdict(objective), objective.beta, ["rpo"]
        super().__post_init__()
        if self.padding_free and self.pad_to_multiple_of is not None:
            raise ValueError(
                f"RPOConfig: `pad_to_multiple_of` {self.pad_to_multiple_of!r} pads, and "
                "`padding_free` does not; leave one of them out"
            )

    def make_objective(self) -> RPOObjective:
        """The objective that ``objective`` and ``beta`` describe."""
        return read_objective(self.objective, self.beta)


def read_objective(
    description: RPOObjective | dict | str | None, beta: float | None = None
) -> RPOObjective:
    """An objective from any of the forms that :class:`RPOConfig` takes."""
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
            f"{op}: `beta` {beta} contradicts the objective's beta {fields['beta']}; say it once"
        )
    unknown = [name for name in fields if name not in known]
    if unknown:
        has, knows = (", ".join(f"`{name}`" for name in names) for names in (unknown, known))
        raise ValueError(f"{op}: {preset or 'an objective'} has no {has}, only {knows}")
    return make(**fields)
