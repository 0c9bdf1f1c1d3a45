"""Run the code of docs/start.md, and write what came of it: the notebook, and the page's outputs.

    python docs/tools/start.py

The part of the page between its marks becomes examples/start.ipynb: text and code as they are,
outputs as they came. Below their code the page shows the same: what was printed, and plots. The
page's table of the demo is made of benchmarks/results/demo, which
``python examples/align.py --output benchmarks/results/demo`` writes.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE, PLOTS = ROOT / "docs" / "start.md", ROOT / "docs" / "start"
NOTEBOOK = ROOT / "examples" / "start.ipynb"
DEMO = ROOT / "benchmarks" / "results" / "demo" / "results.json"
MARKED = re.compile(r"(<!-- notebook -->\n)(.*?)(<!-- end -->)", re.DOTALL)
CODE = re.compile(
    r"```python\n(.*?)\n```\n(?:\n```text\n.*?\n```\n|\n!\[[^\]]*\]\([^)]*\)\n)*", re.DOTALL
)
TABLE = re.compile(r"(<!-- demo table: .*? -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def cells(page: str) -> list[tuple[str, str]]:
    """("markdown" or "code", source) of the marked part, without outputs."""
    found = []
    pieces = CODE.split(MARKED.search(page)[2])  # text, code, text, code, ..., text
    for i, piece in enumerate(pieces):
        kind, source = ("code", piece) if i % 2 else ("markdown", piece.strip())
        if kind == "markdown":  # links of docs/ as seen from examples/
            source = re.sub(r"\]\((?!http)", "](../docs/", source)
        if source:
            found.append((kind, source))
    return found


def run(page: str) -> dict:
    """The notebook, executed in the folder where it lies."""
    import nbformat
    from nbclient import NotebookClient

    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    made = [make[kind](source, id=f"cell-{i}") for i, (kind, source) in enumerate(cells(page))]
    notebook = nbformat.v4.new_notebook(cells=made)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=1200, resources=where, record_timing=False).execute()
    for cell in made:
        if cell.cell_type == "code":  # warnings of libraries name paths of this machine
            cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": kernel}  # any Python will do
    return notebook


def outputs(cell: dict) -> tuple[str, list[bytes]]:
    """What a cell printed, and its plots as PNG."""
    found = cell["outputs"]
    text = "".join("".join(x["text"]) for x in found if x["output_type"] == "stream")
    plots = [x["data"]["image/png"] for x in found if "image/png" in x.get("data", {})]
    return text.rstrip(), [base64.b64decode(plot) for plot in plots]


def filled(page: str, notebook: dict, demo: dict) -> tuple[str, list[bytes]]:
    """The page with these outputs, and the plots that it shows."""
    code = iter([cell for cell in notebook["cells"] if cell["cell_type"] == "code"])
    shown: list[bytes] = []

    def with_outputs(block: re.Match) -> str:
        text, plots = outputs(next(code))
        parts = [f"```python\n{block[1]}\n```\n"]
        if text:
            parts.append(f"```text\n{text}\n```\n")
        for plot in plots:
            shown.append(plot)
            parts.append(f"![What the code above draws]({PLOTS.name}/{len(shown)}.png)\n")
        return "\n".join(parts)

    page = MARKED.sub(lambda part: part[1] + CODE.sub(with_outputs, part[2]) + part[3], page)
    return TABLE.sub(lambda part: part[1] + demo_table(demo) + part[3], page), shown


def demo_table(demo: dict) -> str:
    rows = ["| held out | before | after | change |", "|---|---|---|---|"]
    for name, columns in demo["held_out"].items():
        text = [f"{x['mean']:.3f} ± {x['error']:.3f}" for x in columns.values()]
        rows.append(f"| {' | '.join([name, *text])} |")
    naive, ours = (peak / 2**20 for peak in demo["peaks"])
    peaks = f"Peak memory of the loss head: naive {naive:.0f} MiB, here {ours:.0f} MiB."
    rows += ["", f"{peaks} This run took {demo['settings']['seconds']} seconds."]
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    page, demo = PAGE.read_text(encoding="utf-8"), json.loads(DEMO.read_text(encoding="utf-8"))
    notebook = run(page)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page, plots = filled(page, notebook, demo)
    PAGE.write_text(page, encoding="utf-8")
    PLOTS.mkdir(exist_ok=True)
    for number, plot in enumerate(plots, 1):
        (PLOTS / f"{number}.png").write_bytes(plot)


if __name__ == "__main__":
    main()
