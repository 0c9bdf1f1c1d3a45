"""Results of benchmarks: a JSON file with the provenance of its numbers, Markdown tables and plots.

    # write tables and plots again, next to the file
    python benchmarks/results.py benchmarks/results/bench.json

Rows hold: case (part, model, N, H, V, share, dtype), provider, version, and its status: "ok" with
median_s, quartiles, rounds, peak_bytes, limit_s (what the hardware would need, its bare GEMMs or
its bytes, measured in the same run) and errors; else the reason.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import zlib
from pathlib import Path

import pairs
import torch
from cases import Case
from cpu import processor
from providers import PROVIDERS, Provider

from rpo_kernels.kernels.launch import OWN_TABLE

ROOT = Path(__file__).parent.parent
# what two runs must share to be in one file
SAME = (
    "device",
    "driver",
    "torch",
    "triton",
    "commit",
    "sizes",
    "launch_table",
)


def about(device: str, sizes: str, **more: object) -> dict:
    """Return device, driver, versions, commit and command."""
    run = lambda *command: subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    facts = {
        "device": f"{processor()}, {torch.get_num_threads()} threads",
        "driver": None,
        "kind": device,
        "sizes": sizes,
    }
    if device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
        try:
            facts["driver"] = run(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
            ).splitlines()[0]
        except (OSError, IndexError):
            facts["driver"] = torch.version.cuda or torch.version.hip
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    describe = "git", "describe", "--always", "--dirty=+changes", "--exclude=*"
    try:  # RPO_COMMIT: of a copy without its history
        facts["commit"] = os.environ.get("RPO_COMMIT") or run(*describe)
    except OSError:
        facts["commit"] = ""
    own = os.environ.get(OWN_TABLE)  # settings that are not the package's
    facts["launch_table"] = f"{zlib.crc32(Path(own).read_bytes()):08x}" if own else None
    facts |= {"torch": torch.__version__, "python": platform.python_version()}
    words = [
        "-m pytest" if word.endswith("pytest/__main__.py") else word.removeprefix(f"{ROOT}/")
        for word in sys.argv
    ]
    facts["command"] = " ".join(["python", *words])
    return facts | more


class Results:
    """Rows of one device and commit, saved after each; `key` names what tells them apart."""

    def __init__(self, path: Path, about: dict, key: tuple[str, ...] = ("case", "provider")):
        self.path, self.about, self.key, self.rows = path, about, key, []
        if path.exists():
            old = json.loads(path.read_text())
            if all(old["about"].get(name) == about[name] for name in SAME):
                self.rows = old["rows"]

    def find(self, **key: object) -> dict | None:
        return next((row for row in self.rows if all(row[k] == key[k] for k in self.key)), None)

    def has(self, case: Case, provider: Provider) -> bool:
        row = self.find(case=case.id, provider=provider.name)
        # what was not installed may be by now
        return row is not None and row["status"] != "skipped"

    def add(self, case: Case, provider: Provider, status: str, **facts: object) -> None:
        row = {
            "case": case.id,
            "part": case.part.name,
            "model": case.model.name,
            "N": case.rows,
            "H": case.model.H,
            "V": case.model.V,
            "share": case.share,
            "dtype": str(case.dtype)[6:],
            "provider": provider.name,
            "version": provider.version,
            "status": status,
            **facts,
        }
        self.put(row)

    def put(self, row: dict) -> None:
        """In place of the row with its key, or at the end."""
        old = self.find(**row)
        if old is None:
            self.rows.append(row)
        else:
            self.rows[self.rows.index(old)] = row
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n  ".join(json.dumps(row) for row in self.rows)
        self.path.write_text(
            f'{{\n "about": {json.dumps(self.about, indent=1)},\n "rows": [\n  {rows}\n ]\n}}\n'
        )


# ---- tables --------------------------------------------------------------------------------------


def figure(x: float) -> str:
    """Format with three digits."""
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def memory(bytes: float) -> str:
    return f"{figure(bytes / 2**30)} GiB"


def ratio(row: dict) -> str:
    return f"{row['median_s'] / row['limit_s']:.2f}"


def _cells(row: dict) -> list[str]:
    if row["status"] != "ok":
        reason = row.get("reason", "")
        return [row["provider"], f"{row['status']}{': ' if reason else ''}{reason}", "", "", ""]
    first, third = row["quartiles_s"]
    time = f"{figure(1e3 * row['median_s'])} ({figure(1e3 * first)} to {figure(1e3 * third)})"
    errors = ", ".join(
        [
            f"{row['error']:.1e}",
            *(f"{name} {error:.1e}" for name, error in row["gradient_errors"].items()),
        ]
    )
    return [
        row["provider"],
        time,
        ratio(row),
        figure(row["peak_bytes"] / 2**30),
        errors,
    ]


def where(about: dict) -> str:
    kind = "on a GPU" if about["kind"] == "cuda" else "on a CPU"
    driver = f", driver {about['driver']}" if about["driver"] else ""
    sizes = (
        ""
        if about["sizes"] == "full"
        else "; sizes that show that all of it runs, not how fast it is"
    )
    return (
        f"Measured {kind} ({about['device']}{driver}, torch {about['torch']}, triton "
        f"{about['triton']}, commit {about['commit']}, "
        f"`{about['command']}`){sizes}. Copy bandwidth {about['copy_rate'] / 1e9:.3g} GB/s."
    )


def table(rows: list[dict]) -> str:
    """Return the table of one case: who ran, then who did not and why."""
    ran = [row for row in rows if row["status"] != "skipped"]
    lines = [
        "| provider | ms: median (quartiles) | x limit | peak GiB above inputs | error against "
        "float64: nats, gradients by norm |"
    ]
    lines += ["|---|---|---|---|---|", *(f"| {' | '.join(_cells(row))} |" for row in ran)]
    skipped = [f"{row['provider']} ({row['reason']})" for row in rows if row["status"] == "skipped"]
    return "\n".join([*lines, *(["", f"Skipped: {', '.join(skipped)}."] if skipped else [])])


def report(results: dict) -> str:
    """Return the tables of all cases, each with its limit."""
    lines = [
        "# The loss head, against float64, peers and the hardware",
        "",
        where(results["about"]),
    ]
    for case in dict.fromkeys(row["case"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["case"] == case]
        limits = [
            f"{figure(1e3 * row['limit_s'])} ms ({row['limit']})" for row in rows if "limit" in row
        ]
        lines += ["", f"## {case}", "", *(f"Limit: {x}" for x in limits[:1]), "", table(rows)]
    return "\n".join(lines) + "\n"


def summary(results: dict) -> str:
    """The first model and number of rows, all scored: milliseconds, ratio to the limit (bare GEMMs,
    or bytes at the rate of a copy), peak GiB and error in nats of each provider in each part.
    """
    first = results["rows"][0]
    chosen = [
        r
        for r in results["rows"]
        if (r["model"], r["N"], r["share"]) == (first["model"], first["N"], first["share"])
    ]
    parts, providers = (
        list(dict.fromkeys(row[key] for row in chosen)) for key in ("part", "provider")
    )
    by_name = {(row["part"], row["provider"]): row for row in chosen}
    lines = [
        f"| {first['model']}, N {first['N']}, H {first['H']}, V {first['V']}, {first['dtype']} | "
        f"{' | '.join(providers)} |"
    ]
    lines.append("|---" * (1 + len(providers)) + "|")
    for part in parts:
        cells = []
        for provider in providers:
            row = by_name.get((part, provider), {"status": ""})
            done = row["status"] == "ok"
            cells.append(
                f"{figure(1e3 * row['median_s'])} ms, {ratio(row)} x, "
                f"{memory(row['peak_bytes'])}, {row['error']:.0e}"
                if done
                else row["status"] or "not run"
            )
        lines.append(
            f"| {part} | {' | '.join('' if cell == 'skipped' else cell for cell in cells)} |"
        )
    columns = (
        "Median time, its ratio to the bare GEMMs (from logits: to its bytes at the rate of a "
        "copy), peak memory above the inputs, and error against float64 in nats."
    )
    return f"{where(results['about'])} {columns}\n\n" + "\n".join(lines)


# ---- plots ---------------------------------------------------------------------------------------


def host_table(rows: dict[str, dict[str, dict]]) -> str:
    """Of what benchmarks/host.py measured."""
    part = "launches | frames | us | bare launches | ratio"
    lines = [f"| call | cores | {part} | and backward: {part} |", "|---" * 12 + "|"]
    for name, row in rows.items():
        for condition in (x for x in pairs.CONDITIONS if x in row["call"]):
            cells = [name, condition]
            for found in row.values():
                x, launches = found[condition], found["launches"]
                ratio = pairs.shown(x["ratio"]) if launches else ""
                cells += [str(launches), str(found["frames"])]
                cells += [f"{x['us']:.0f}", f"{x['bare us']:.0f}", ratio]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plots(results: dict, folder: Path, name: str) -> list[Path]:
    """Plot time and memory against N for the first model, and bars against peers at its first N."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in results["rows"] if row["status"] == "ok"]
    if not rows:
        return []
    first = rows[0]
    rows = [row for row in rows if (row["model"], row["share"]) == (first["model"], first["share"])]
    parts = list(dict.fromkeys(row["part"] for row in rows))
    names = [p.name for p in PROVIDERS if any(row["provider"] == p.name for row in rows)]
    color = {provider: f"C{i}" for i, provider in enumerate(names)}
    title = f"{first['model']}, V {first['V']}, {first['dtype']}: {results['about']['device']}"

    counts = sorted({row["N"] for row in rows})

    def grid(height: float) -> tuple[plt.Figure, list[plt.Axes]]:
        columns = min(4, len(parts))
        lines = -(-len(parts) // columns)
        figure, axes = plt.subplots(
            lines,
            columns,
            figsize=(3.4 * columns, height * lines),
            squeeze=False,
            layout="constrained",
        )
        for axis in axes.flat[len(parts) :]:
            axis.set_axis_off()
        return figure, list(axes.flat[: len(parts)])

    def against_rows(key: str, label: str, scale: float, with_limit: bool) -> plt.Figure:
        figure, axes = grid(3.0)
        for axis, part in zip(axes, parts):
            for provider in names:
                points = sorted(
                    (r["N"], r[key] / scale)
                    for r in rows
                    if (r["part"], r["provider"]) == (part, provider)
                )
                if points:
                    axis.plot(
                        *zip(*points),
                        marker="o",
                        markersize=3,
                        color=color[provider],
                        label=provider,
                    )
            if with_limit:
                points = sorted(
                    {r["N"]: r["limit_s"] / scale for r in rows if r["part"] == part}.items()
                )
                axis.plot(*zip(*points), "k--", linewidth=1, label="limit")
            axis.set(title=part, xlabel="N", ylabel=label, xscale="log", yscale="log")
            axis.set_xticks(counts, counts, fontsize=7)
            axis.minorticks_off()
        handles = {
            label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels())
        }
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8
        )
        figure.suptitle(title)
        return figure

    def bars() -> plt.Figure:
        at = [row for row in rows if row["N"] == first["N"]]
        figure, axes = grid(2.4)
        for axis, part in zip(axes, parts):
            chosen = [row for row in at if row["part"] == part][::-1]
            spread = [
                [r["median_s"] - r["quartiles_s"][0], r["quartiles_s"][1] - r["median_s"]]
                for r in chosen
            ]
            axis.barh(
                [row["provider"] for row in chosen],
                [1e3 * row["median_s"] for row in chosen],
                xerr=[[1e3 * x for x in side] for side in zip(*spread)] or None,
                color=[color[r["provider"]] for r in chosen],
            )
            for row in chosen[:1]:
                axis.axvline(1e3 * row["limit_s"], color="k", linestyle="--", linewidth=1)
            axis.set(title=part, xlabel="ms (dashed: limit)")
            axis.tick_params(labelsize=7)
        figure.suptitle(f"N {first['N']}, {title}")
        return figure

    written = []
    for suffix, draw in [
        ("time", lambda: against_rows("median_s", "ms", 1e-3, True)),
        ("memory", lambda: against_rows("peak_bytes", "GiB above inputs", 2**30, False)),
        ("peers", bars),
    ]:
        drawn = draw()
        written.append(folder / f"{name}-{suffix}.png")
        drawn.savefig(written[-1], dpi=80)
        plt.close(drawn)
    return written


def publish(path: Path) -> list[Path]:
    """Write tables and plots next to a results file; plots only if matplotlib is installed."""
    results = json.loads(path.read_text())
    written = [path.with_suffix(".md")]
    written[0].write_text(report(results))
    try:
        written += plots(results, path.parent, path.stem)
    except ImportError:
        print("no plots: matplotlib is not installed")
    return written


if __name__ == "__main__":
    for file in sys.argv[1:]:
        print(*publish(Path(file)), sep="\n")
