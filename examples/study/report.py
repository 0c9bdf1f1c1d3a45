"""Tables with standard errors from the file of results, also for the marks of a page."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from tabulate import tabulate

from . import theory
from .plots import plot
from .results import Results
from .settings import AXES, BASE, DISTANCES, Setting

# Student's t for a two-sided error of 1 %, by degrees of freedom (seeds - 1)
T = (63.66, 9.92, 5.84, 4.60, 4.03, 3.71, 3.50, 3.36, 3.25, 3.17, 3.11, 3.05, 3.01, 2.98, 2.95)
COLUMNS = {"KL": "kl", "to the optimum": "distance"}  # where names differ from those of the file
NUMBERS = ("start", "reward", "KL", "at equal KL", "efficiency", "to the optimum")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error."""

    mean: float
    error: float
    n: int

    @staticmethod
    def of(values: list[float | None]) -> Estimate:
        known = [value for value in values if value is not None]
        error = stdev(known) / math.sqrt(len(known)) if len(known) > 1 else math.nan
        return Estimate(fmean(known) if known else math.nan, error, len(known))

    @property
    def is_resolved(self) -> bool:
        """Whether it differs from 0 at 1 %."""
        return self.n > 1 and abs(self.mean) > self.error * T[min(self.n - 1, len(T)) - 1]

    def text(self, sign: str = "") -> str:
        return f"{self.mean:{sign}.3f} ± {self.error:.3f}" if self.n else ""

    def bold(self) -> str:
        """Format a difference, in bold if it is resolved."""
        return f"**{self.text('+')}**" if self.is_resolved else self.text("+")


class Study:
    """Runs by setting, then by seed, and their evaluation."""

    def __init__(self, results: Results):
        self.runs: dict[Setting, dict[int, dict]] = {}
        for (setting, seed), run in sorted(results.runs.items(), key=lambda item: item[0][1]):
            self.runs.setdefault(setting, {})[seed] = run

    def settings(self, axis: str) -> list[Setting]:
        """Return the settings of an axis that were run."""
        return [
            s for s in dict.fromkeys((*AXES[axis].settings, *AXES[axis].more)) if s in self.runs
        ]

    def values(self, column: str, setting: Setting) -> dict[int, float | None]:
        """Return values by seed at the end of runs; `start` is the reward before the first step."""
        runs = self.runs.get(setting, {})
        if column == "start":
            return {seed: run["curve"][0]["reward"] for seed, run in runs.items()}
        if column == "at equal KL":
            gains = {seed: self.at_equal_kl(setting, seed) for seed in runs}
            return {} if None in gains.values() else gains  # seeds in reach are a biased sample
        return {seed: run["curve"][-1][COLUMNS.get(column, column)] for seed, run in runs.items()}

    def difference(self, column: str, setting: Setting, other: Setting) -> Estimate:
        """Return the difference, paired by seed."""
        left, right = self.values(column, setting), self.values(column, other)
        pairs = [(left[seed], right[seed]) for seed in left if seed in right]
        return Estimate.of([None if None in pair else pair[0] - pair[1] for pair in pairs])

    def at_equal_kl(self, setting: Setting, seed: int) -> float | None:
        """Return the reward minus that of the base at equal KL; None beyond all of the base's.

        The base's rewards at its strengths, without this setting, are interpolated in sqrt(KL),
        where they are almost linear.
        """
        sweep = [
            s for s in AXES["strength"].settings if s != setting and seed in self.runs.get(s, {})
        ]
        first, last = (self.runs[setting][seed]["curve"][at] for at in (0, -1))
        ends = [self.runs[s][seed]["curve"][-1] for s in sweep]
        points = [
            (0.0, first["reward"]),
            *sorted((end["kl"] ** 0.5, end["reward"]) for end in ends),
        ]
        roots, rewards = zip(*points)
        root = max(last["kl"], 0) ** 0.5
        return (
            last["reward"] - float(np.interp(root, roots, rewards)) if root <= roots[-1] else None
        )

    def row(self, setting: Setting) -> dict[str, str]:
        """Return a row of a table."""
        runs = self.runs[setting].values()
        below = sum(run["curve"][-1]["reward"] < run["curve"][0]["reward"] for run in runs)
        accuracy = Estimate.of([run["judge accuracy"] for run in runs])
        estimate = lambda column: Estimate.of(list(self.values(column, setting).values()))
        against = self.difference("to the optimum", setting, BASE)
        return {
            "setting": str(setting) + (f" (accuracy {accuracy.text()})" if accuracy.n else ""),
            "reward": estimate("reward").text(),
            "KL": estimate("KL").text(),
            "at equal KL": estimate("at equal KL").bold(),
            "efficiency": estimate("efficiency").text(),
            "to the optimum": estimate("to the optimum").text(),
            "against the base": "" if setting == BASE else against.bold(),
            "below start": f"{below} of {len(runs)}",
        }

    def table(self, axis: str) -> str:
        rows = [self.row(setting) for setting in self.settings(axis)]
        return tabulate(rows, "keys", "github", disable_numparse=True)


def theory_table() -> str:
    """Return the KL to the optimum of a policy that is a table, for equal eta / beta."""
    etas, rows = (0.1, 1.0, 10.0), []
    for comparison in ("listwise", "pairwise", "pointwise", "pointwise, rewards less log Z"):
        for distance in DISTANCES:
            kind = comparison.split(",")[0], comparison.endswith("log Z")
            reached = [theory.distance_to_optimum(distance, kind[0], eta, kind[1]) for eta in etas]
            shown = ["< 0.0001" if kl < 1e-4 else f"{kl:.2f}" for kl in reached]
            rows.append((comparison, distance, *shown))
    heads = ("comparison", "distance", *(f"eta {eta:g}" for eta in etas))
    return tabulate(rows, heads, "github", disable_numparse=True)


def provenance(results: Results) -> str:
    """Return commands, seeds, time, versions and commits."""
    settings, seeds = {s for s, _ in results.runs}, sorted({seed for _, seed in results.runs})
    minutes = sum(run["seconds"] for run in results.runs.values()) / 60
    origins = sorted({(run["command"], run["environment"]) for run in results.runs.values()})
    lines = [
        f"{len(results.runs)} runs of {len(settings)} settings, seeds {seeds[0]} to {seeds[-1]}, "
        f"{minutes:.0f} minutes of one process:\n",
        *(f"- `{command}`: {environment}" for command, environment in origins),
    ]
    return "\n".join(lines)


def write(results: Results, axes: list[str], output: Path, page: Path | None) -> None:
    """Write report.md and plots/ to the output folder, and fill the marks of a page."""
    study = Study(results)
    if not study.settings("strength"):
        raise ValueError(f"{results.path}: expected runs of the axis 'strength', got none")
    axes = [axis for axis in axes if study.settings(axis)]
    tables = {axis: study.table(axis) for axis in axes}
    tables |= {"theory": theory_table(), "runs": provenance(results)}
    for axis in axes:
        plot(study, axis, output / "plots" / f"{axis}.png")
    text = "\n\n".join(f"## {name}\n\n{table}" for name, table in tables.items())
    (output / "report.md").write_text(f"# Study\n\n{text}\n", encoding="utf-8")
    if page is not None:
        page.write_text(filled(page.read_text(encoding="utf-8"), study, tables), encoding="utf-8")


def filled(text: str, study: Study, tables: dict[str, str]) -> str:
    """Replace the contents of a page's marks.

    They are `<!-- table: NAME -->...<!-- end -->` for tables, and for numbers
    `<!-- COLUMN: SETTING -->...<!-- end -->` or
    `<!-- COLUMN: SETTING less SETTING -->...<!-- end -->`.
    """
    settings = {str(setting): setting for setting in study.runs}

    def renew(match: re.Match) -> str:
        column, name = match.groups()
        mark = f"<!-- {column}: {name} -->"
        if column == "table" and name in tables:
            return f"{mark}\n{tables[name]}\n<!-- end -->"
        names = name.split(" less ")
        if column not in NUMBERS or not settings.keys() >= set(names):
            raise ValueError(
                f"--page: expected a table, or a column and a setting, of the results, got {mark!r}"
            )
        chosen = [settings[name] for name in names]
        if len(chosen) == 2:
            value = study.difference(column, *chosen).bold()
        else:
            estimate = Estimate.of(list(study.values(column, *chosen).values()))
            value = estimate.bold() if column == "at equal KL" else estimate.text()
        return f"{mark}{value}<!-- end -->"

    return re.sub(r"<!-- ([\w ]+): (.+?) -->.*?<!-- end -->", renew, text, flags=re.DOTALL)
