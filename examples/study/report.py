"""Tables with standard errors and plots of reward against KL, from the file of results; also between the marks of a page."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from tabulate import tabulate

from . import theory
from .results import Results
from .settings import AXES, BASE, DISTANCES, Setting

# Student's t for a two-sided error of 1 %, by degrees of freedom: seeds - 1
T = [
    63.66,
    9.92,
    5.84,
    4.60,
    4.03,
    3.71,
    3.50,
    3.36,
    3.25,
    3.17,
    3.11,
    3.05,
    3.01,
    2.98,
    2.95,
    2.92,
    2.90,
    2.88,
    2.86,
]
FRONTIER, GREY = "#9aa5b1", "#555555"


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

    def __str__(self) -> str:
        return "" if not self.n else f"{self.mean:.3f} ± {self.error:.3f}"

    def signed(self) -> str:
        """As a difference, in bold where it is resolved."""
        text = "" if not self.n else f"{self.mean:+.3f} ± {self.error:.3f}"
        return f"**{text}**" if self.is_resolved else text


class Study:
    """Runs by setting, then by seed, and what is made of them."""

    def __init__(self, results: Results):
        self.runs: dict[Setting, dict[int, dict]] = {}
        for (setting, seed), run in sorted(results.runs.items(), key=lambda item: item[0][1]):
            self.runs.setdefault(setting, {})[seed] = run

    def last(self, setting: Setting, name: str) -> list[float | None]:
        return [run["curve"][-1][name] for run in self.runs[setting].values()]

    def at_equal_kl(self, setting: Setting, seed: int) -> float | None:
        """Reward, less that of the base at the strength which leads as far from the reference; None farther than it goes.

        Reward grows about linearly in sqrt(KL), between whose values at the strengths it is interpolated, without this setting.
        """
        curve = [
            run["curve"][-1]
            for other in AXES["strength"].settings
            if other != setting and (run := self.runs.get(other, {}).get(seed))
        ]
        last = self.runs[setting][seed]["curve"]
        points = sorted((math.sqrt(point["kl"]), point["reward"]) for point in curve)
        root = math.sqrt(max(last[-1]["kl"], 0))
        if not points or root > points[-1][0]:
            return None
        roots, rewards = zip((0.0, last[0]["reward"]), *points)
        return last[-1]["reward"] - float(np.interp(root, roots, rewards))

    def against_base(self, setting: Setting, name: str) -> list[float | None]:
        """Differences of a last value to the base's, seed by seed."""
        base, pairs = self.runs.get(BASE, {}), []
        for seed, run in self.runs[setting].items():
            both = run["curve"][-1][name], base[seed]["curve"][-1][name] if seed in base else None
            pairs.append(None if None in both else both[0] - both[1])
        return pairs

    def row(self, setting: Setting) -> dict[str, str]:
        """A line of a table."""
        runs = self.runs[setting]
        below = sum(run["curve"][-1]["reward"] < run["curve"][0]["reward"] for run in runs.values())
        accuracy = Estimate.of([run["judge accuracy"] for run in runs.values()])
        return {
            "setting": str(setting) + (f" (accuracy {accuracy})" if accuracy.n else ""),
            "reward": str(Estimate.of(self.last(setting, "reward"))),
            "KL": str(Estimate.of(self.last(setting, "kl"))),
            "at equal KL": Estimate.of([self.at_equal_kl(setting, seed) for seed in runs]).signed(),
            "efficiency": str(Estimate.of(self.last(setting, "efficiency"))),
            "to the optimum": str(Estimate.of(self.last(setting, "distance"))),
            "against the base": Estimate.of(self.against_base(setting, "distance")).signed()
            if setting != BASE
            else "",
            "below start": f"{below} of {len(runs)}",
        }

    def settings(self, axis: str) -> list[Setting]:
        """Those of an axis that were run."""
        return [s for s in dict.fromkeys(AXES[axis].settings + AXES[axis].more) if s in self.runs]

    def table(self, axis: str) -> str:
        rows = [self.row(setting) for setting in self.settings(axis)]
        return tabulate(rows, "keys", "github", disable_numparse=True)

    def plot(self, axis: str, path: Path) -> None:
        """Held-out reward against KL: each setting's way, and the most that can be had."""
        from matplotlib import colormaps
        from matplotlib.figure import Figure  # without pyplot: no window, no global state

        figure = Figure(figsize=(9, 5), dpi=90, layout="constrained")
        ax, colors = figure.subplots(), colormaps["tab20"]
        best = [
            self.mean_of(s, lambda run: (run["optimum"]["kl"], run["optimum"]["reward"]))
            for s in self.settings("strength")
        ]
        begin = (
            self.mean_of(BASE, lambda run: (run["curve"][0]["kl"], run["curve"][0]["reward"]))
            if BASE in self.runs
            else (0, 0)
        )
        sweep = [self.mean_of(s, lambda run: (run["curve"][-1]["kl"], run["curve"][-1]["reward"]))
            for s in AXES["strength"].settings if s in self.runs]  # fmt: skip
        ax.plot(
            *zip(begin, *sorted(best)),
            color=FRONTIER,
            linewidth=4,
            alpha=0.6,
            label="exact optimum, any strength",
        )
        ax.plot(
            *zip(begin, *sorted(sweep)), "--", color=GREY, linewidth=1, label="base, any strength"
        )
        for i, setting in enumerate(self.settings(axis)):
            x, y = (Estimate.of(self.last(setting, name)) for name in ("kl", "reward"))
            way = [self.mean_of(setting, lambda run: (run["curve"][t]["kl"], run["curve"][t]["reward"]))  # noqa: B023
                for t in range(len(next(iter(self.runs[setting].values()))["curve"]))]  # fmt: skip
            color = colors(i % 20)
            ax.plot(*zip(*way), color=color, linewidth=1, alpha=0.6)
            ax.errorbar(
                x.mean,
                y.mean,
                y.error,
                x.error,
                fmt="o",
                color=color,
                markersize=5,
                label=str(setting),
            )
        farthest = max(Estimate.of(self.last(s, "kl")).mean for s in self.settings(axis))
        ax.set(
            xlabel="KL to the reference, nats",
            ylabel="judge's points, held-out prompts",
            title=AXES[axis].question,
        )
        ax.set_xlim(-0.03, 1.15 * max(farthest, 0.5))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.legend(
            fontsize=7,
            frameon=False,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            ncols=1 + len(self.settings(axis)) // 30,
        )
        figure.savefig(path)

    def mean_of(self, setting: Setting, point) -> tuple[float, float]:
        xs, ys = zip(*(point(run) for run in self.runs[setting].values()))
        return fmean(xs), fmean(ys)


def theory_table() -> str:
    """KL to the optimum of a policy that is a table, where eta / beta is equal."""
    etas, rows = (0.1, 1.0, 10.0), []
    for comparison, normalized in (
        ("listwise", False),
        ("pairwise", False),
        ("pointwise", False),
        ("pointwise", True),
    ):
        for distance in DISTANCES:
            distances = [
                theory.distance_to_optimum(distance, comparison, eta, normalized=normalized)
                for eta in etas
            ]
            name = comparison + (", rewards less log Z" if normalized else "")
            rows.append(
                (
                    distance,
                    name,
                    *("< 0.0001" if value < 1e-4 else f"{value:.2f}" for value in distances),
                )
            )
    return tabulate(
        rows,
        ("distance", "comparison", *(f"eta {eta:g}" for eta in etas)),
        "github",
        disable_numparse=True,
    )


def provenance(results: Results) -> str:
    """Commands, seeds, time, versions and commits."""
    runs = results.runs.values()
    seeds = sorted({seed for _, seed in results.runs})
    origins = sorted({(run["command"], run["environment"]) for run in runs})
    seconds = sum(run["seconds"] for run in runs)
    return (
        f"{len(results.runs)} runs of {len({s for s, _ in results.runs})} settings, seeds {seeds[0]} to {seeds[-1]}, "
        f"{seconds / 60:.0f} minutes of one process.\n\n"
        + "\n".join(f"- `{command}`: {where}" for command, where in origins)
    )


def write(results: Results, axes: list[str], output: Path, page: Path | None) -> None:
    """report.md and plots/ in the output folder, and what stands between the marks of a page."""
    study = Study(results)
    axes = [axis for axis in axes if study.settings(axis)]
    (output / "plots").mkdir(parents=True, exist_ok=True)
    for axis in axes:
        study.plot(axis, output / "plots" / f"{axis}.png")
    tables = {axis: study.table(axis) for axis in axes} | {
        "theory": theory_table(),
        "runs": provenance(results),
    }
    titles = {axis: AXES[axis].question for axis in axes} | {
        "theory": "A table as the policy",
        "runs": "Runs",
    }
    text = "\n\n".join(f"## {titles[name]}\n\n{table}" for name, table in tables.items())
    (output / "report.md").write_text(f"# Study\n\n{text}\n", encoding="utf-8")
    if page is not None:
        page.write_text(filled(page.read_text(encoding="utf-8"), study, tables), encoding="utf-8")


def filled(text: str, study: Study, tables: dict[str, str]) -> str:
    """A page with ``<!-- table: AXIS -->...<!-- end -->`` and ``<!-- COLUMN: SETTING -->...<!-- end -->`` renewed."""
    settings = {str(setting): setting for setting in study.runs}

    def renew(match: re.Match) -> str:
        column, name = match[1], match[2]
        if column == "table":
            if name not in tables:
                raise ValueError(
                    f"--page: {match[0][:60]!r} names no table; there are {', '.join(tables)}"
                )
            value = f"\n{tables[name]}\n"
        else:
            row = study.row(settings[name]) if name in settings else {}
            if column not in row:
                raise ValueError(
                    f"--page: {match[0][:60]!r} names no column and setting of the results"
                )
            value = row[column].strip("*")
        return f"<!-- {column}: {name} -->{value}<!-- end -->"

    return re.sub(r"<!-- ([\w ]+): (.+?) -->.*?<!-- end -->", renew, text, flags=re.DOTALL)
