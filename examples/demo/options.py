"""The command line of the demo; bad input is refused before a model is loaded."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import torch
from demo.data import read_preferences

from rpo_kernels import RPOObjective
from rpo_kernels.objectives import DISTANCES, PRESETS


def parse(arguments: list[str] | None, description: str) -> argparse.Namespace:
    """Parse arguments, make the objective (`objective`) and read the file (`rows`, or None)."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        help="folder or hub name of a causal language model; default: SmolLM2-135M-Instruct from "
        "PyPI",
    )
    add(
        "--data",
        metavar="FILE",
        help="JSON Lines of preferences; default: sample and judge answers",
    )
    add(
        "--objective",
        metavar="NAME",
        help=f"distance ({', '.join(DISTANCES)}) or preset ({', '.join(PRESETS)}); "
        "default: squared, with --data backward_kl, or dpo where the file has no scores",
    )
    add("--beta", type=float, help="implicit reward units per nat; default: the objective's")
    add("--eta", type=float, help="target units per unit of reward; default: the objective's")
    add(
        "--lr",
        type=positive(float),
        default=3e-5,
        help="learning rate of AdamW; default: %(default)s",
    )
    add("--steps", type=positive(int), default=16, help="optimizer steps; default: %(default)s")
    add("--prompts", type=positive(int), default=6, help="prompts in a step; default: %(default)s")
    add(
        "--responses",
        type=positive(int),
        default=4,
        help="responses sampled to a prompt, K; default: %(default)s",
    )
    add("--temperature", type=positive(float), help="of the policy; default: 0.7, with --data 1")
    add(
        "--sample-tokens",
        type=positive(int),
        default=32,
        help="longest sampled response; default: %(default)s",
    )
    add(
        "--max-tokens",
        type=positive(int),
        default=256,
        help="--data: cut responses to this; default: %(default)s",
    )
    add(
        "--held-out",
        type=positive(int),
        default=24,
        help="prompts kept for evaluation; default: %(default)s",
    )
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    add("--seed", type=int, default=0, help="of everything random; default: %(default)s")
    add(
        "--output",
        type=Path,
        default="demo_output",
        metavar="DIR",
        help="of plot and numbers; default: %(default)s",
    )
    args = parser.parse_args(arguments)
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    args.rows = read_preferences(args.data) if args.data else None
    unscored = any(not row.scored for row in args.rows or ())
    args.objective = make_objective(
        args.objective or ("dpo" if unscored else "backward_kl" if args.data else "squared"),
        args.beta,
        args.eta,
    )
    args.temperature = args.temperature or (1.0 if args.data else 0.7)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device!r}: {str(error).splitlines()[0]}") from None
    if args.rows is None:
        if args.responses < 2:
            raise ValueError(f"--responses: expected at least 2 to compare, got {args.responses}")
    else:
        if unscored and args.objective.uses_rewards:
            raise ValueError(
                f"{args.data} has rows without scores, which this --objective needs: add "
                "chosen_reward and rejected_reward to every row, or choose a preset without "
                "rewards, such as dpo"
            )
        if len(args.rows) <= args.held_out:
            raise ValueError(
                f"{args.data}: expected more rows than --held-out {args.held_out}, got "
                f"{len(args.rows)}: none is left for training"
            )
    most = max((len(row.responses) for row in args.rows or ()), default=args.responses)
    if args.objective.label is not None and most > 2:
        raise ValueError(f"--objective: this one compares pairs, got groups of {most} responses")


def make_objective(name: str, beta: float | None, eta: float | None) -> RPOObjective:
    """Make a distance or a preset by name, with the given numbers and its other defaults."""
    given = {key: value for key, value in (("beta", beta), ("eta", eta)) if value is not None}
    if name in DISTANCES:
        return RPOObjective(name, **given)
    if name not in PRESETS:
        valid = f"a distance ({', '.join(DISTANCES)}) or preset ({', '.join(PRESETS)})"
        raise ValueError(f"--objective {name!r}: expected {valid}")
    preset = getattr(RPOObjective, name)
    takes = list(inspect.signature(preset).parameters)
    for key in given:
        if key not in takes:
            raise ValueError(f"--{key}: the preset {name!r} takes only {', '.join(takes)}")
    return preset(**given)


def positive(kind: type):
    """Return an argument type: a number > 0."""

    def number(text: str):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be greater than 0, got {text}")
        return value

    number.__name__ = kind.__name__  # argparse says "invalid int value"
    return number
