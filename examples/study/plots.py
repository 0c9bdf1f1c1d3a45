"""Plots of held-out reward against KL to the reference: each setting's path, and the optimum."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev

from matplotlib import colormaps
from matplotlib.figure import Figure  # without pyplot: no window, no global state

from .settings import AXES


def plot(study, axis: str, path: Path) -> None:
    """Plot one axis: means over seeds, and standard errors at the ends."""
    figure = Figure(figsize=(9, 5), dpi=90, layout="constrained")
    ax, colors = figure.subplots(), colormaps["tab20"]
    sweep = [study.runs[s].values() for s in AXES["strength"].settings if s in study.runs]
    optima = [mean_point([run["optimum"] for run in runs]) for runs in sweep]
    ends = [mean_point([run["curve"][-1] for run in runs]) for runs in sweep]
    start = mean_point([run["curve"][0] for run in sweep[0]])
    ax.plot(*zip(start, *sorted(optima)), "#c5ccd3", lw=4, label="exact optimum, any strength")
    ax.plot(*zip(start, *sorted(ends)), "--", color="#555555", label="base, any strength")
    for i, setting in enumerate(study.settings(axis)):
        curves = [run["curve"] for run in study.runs[setting].values()]
        way = [mean_point(points) for points in zip(*curves)]
        errors = [error([curve[-1][name] for curve in curves]) for name in ("reward", "kl")]
        color = colors(i % 20)
        ax.plot(*zip(*way), color=color, linewidth=1, alpha=0.6)
        ax.errorbar(*way[-1], *errors, fmt="o", color=color, markersize=5, label=str(setting))
    ax.set(title=AXES[axis].question, xlabel="KL to the reference, nats")
    ax.set(ylabel="judge's points, held-out prompts", xlim=(-0.03, 1.05 * ax.dataLim.x1))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    outside = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "ncols": 1 + len(ax.lines) // 60}
    ax.legend(fontsize=7, frameon=False, **outside)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def mean_point(points: list[dict]) -> tuple[float, float]:
    return fmean(point["kl"] for point in points), fmean(point["reward"] for point in points)


def error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
