"""Report of a run: a table, a plot, and the numbers as JSON."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from tabulate import tabulate

BLUE, GREY = "#2a6fbb", "#9aa5b1"


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its standard error; NaN values do not count."""

    mean: float
    error: float

    @staticmethod
    def of(values: list[float]) -> Estimate:
        known = [value for value in values if not math.isnan(value)]
        mean = fmean(known) if known else math.nan
        return Estimate(mean, stdev(known) / math.sqrt(len(known)) if len(known) > 1 else math.nan)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


@dataclass
class Report:
    """Quantities of each step, and held-out ones before and after the run."""

    steps: list[dict[str, float]]
    held_out: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    samples: list[dict] = field(default_factory=list)
    peaks: tuple[int, int] = (0, 0)  # bytes of one batch's loss head: naive PyTorch, ours

    def add(self, name: str, before: list[float], after: list[float]) -> None:
        """Add a quantity per prompt.

        Its change is paired, so differences between prompts are no noise in it.
        """
        change = [b - a for a, b in zip(before, after, strict=True)]
        columns = {"before": before, "after": after, "change": change}
        self.held_out[name] = {column: Estimate.of(values) for column, values in columns.items()}

    def __str__(self) -> str:
        rows = [(name, *columns.values()) for name, columns in self.held_out.items()]
        table = tabulate(
            rows, ("held out", "before", "after", "change"), stralign="right", disable_numparse=True
        )
        naive, ours = (peak / 2**20 for peak in self.peaks)
        if not naive:
            return table
        return (
            f"{table}\n\nPeak memory of the loss head on one batch: naive {naive:.0f} MiB, here "
            f"{ours:.0f} MiB (measured)."
        )

    def save(self, folder: Path, settings: dict) -> None:
        """Write results.json and training.png."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"settings": settings, **asdict(self)}, default=str)
        numbers = json.loads(text, parse_constant=lambda name: None)  # NaN is not valid JSON
        (folder / "results.json").write_text(
            json.dumps(numbers, indent=1, ensure_ascii=False), encoding="utf-8"
        )
        self.plot(folder / "training.png")

    def plot(self, path: Path) -> None:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state

        figure = Figure(figsize=(13, 4), dpi=120, layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        if self.samples:
            self.curve(left, "reward", "judge reward")
            self.curve(
                middle, "log ratio", "KL to the reference, nats", "training batch, groups kept"
            )
            self.by_rule(right)
        else:
            self.curve(left, "loss", "loss")
            self.curve(middle, "accuracy", "implicit reward accuracy")
            self.curve(right, "log ratio", "log(policy / reference) of the data, nats")
        figure.savefig(path)

    def curve(self, ax, name: str, title: str, label: str = "training batch") -> None:
        """Plot every step as a dot, their running mean, and the held-out values at both ends."""
        values = [step[name] for step in self.steps]
        at = range(1, len(values) + 1)
        known = [
            [v for v in values[max(0, i - 2) : i + 3] if not math.isnan(v)]
            for i in range(len(values))
        ]
        ax.plot(at, values, "o", color=GREY, markersize=4, label=label)
        ax.plot(
            at,
            [fmean(v) if v else math.nan for v in known],
            color=BLUE,
            linewidth=2,
            label="mean of 5 steps",
        )
        if title in self.held_out:
            ends = [self.held_out[title][column] for column in ("before", "after")]
            ax.errorbar(
                (0, len(values) + 1),
                [e.mean for e in ends],
                [e.error for e in ends],
                fmt="D",
                color="black",
                capsize=4,
                label="held out, ± standard error",
            )
        ax.set(title=title, xlabel="step")
        ax.xaxis.get_major_locator().set_params(integer=True)
        finish(ax)

    def by_rule(self, ax) -> None:
        """Plot held-out reward under each rule."""
        rewards = defaultdict(lambda: ([], []))
        for sample in self.samples:
            for side, column in zip(rewards[sample["rule"]], ("before", "after")):
                side += [answer["reward"] for answer in sample[column]]
        at = range(len(rewards))
        for offset, column, color in ((-0.2, 0, GREY), (0.2, 1, BLUE)):
            means = [fmean(sides[column]) for sides in rewards.values()]
            ax.barh(
                [i + offset for i in at],
                means,
                0.38,
                color=color,
                label=("before", "after")[column],
            )
        ax.set(
            title="held-out judge reward by instruction",
            yticks=at,
            yticklabels=rewards,
            xlim=(0, 1),
        )
        ax.set_ylim(len(rewards) - 0.4, -1.2)  # space for the legend above the first bar
        finish(ax, loc="upper right", ncols=2)


def win_rate(rewards: list[float], others: list[float]) -> float:
    """Share of pairs in which the first is better; a tie counts half."""
    return fmean((a > b) + (a == b) / 2 for a in rewards for b in others)


def finish(ax, **legend) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=9, frameon=False, **legend)
