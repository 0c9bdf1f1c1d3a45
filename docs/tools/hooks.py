"""What the site adds to mkdocs: files from outside of docs/, at the place they have in the
repository.

So docs/memory.md is memory.md on the site, and CONTRIBUTING.md is CONTRIBUTING.md. A link is
written for the repository, and loses the ``docs/`` or ``../`` between the two. Sources of the
examples, which a link may lead to, become pages that show them.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = ("CONTRIBUTING.md", "benchmarks/scaling.md", "examples/README.md")
AS_THEY_ARE = ("examples/*.jsonl", "examples/*.ipynb", "benchmarks/results/**/*.png")
SOURCES = re.compile(r"(?<=\]\()[\w/]+(?:\.py)?(?=\))")  # links to Python files and to folders


def on_files(files: Files, config) -> Files:
    found = [path for pattern in AS_THEY_ARE for path in sorted(ROOT.glob(pattern))]
    for path in (*(ROOT / page for page in PAGES), *found):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for name in SOURCES.findall((ROOT / "examples" / "README.md").read_text()):
        page = source_page(ROOT / "examples" / name)
        files.append(File.generated(config, f"examples/{name}.md", content=page))
    return files


def source_page(path: Path) -> str:
    """Of a Python file, or of those in a folder."""
    sources = sorted(path.glob("*.py")) if path.is_dir() else [path]
    blocks = [
        f"## {source.name}\n\n````python\n{source.read_text().rstrip()}\n````" for source in sources
    ]
    if not path.is_dir():
        blocks[0] = blocks[0].partition("\n\n")[2]
    name = path.relative_to(ROOT).as_posix()
    return "\n\n".join([f"# {name}", *blocks])


def on_page_markdown(markdown: str, page, config, files) -> str:
    uri = page.file.src_uri
    if uri == "examples/README.md":
        markdown = SOURCES.sub(r"\g<0>.md", markdown)
    if uri in PAGES:
        return re.sub(r"(?<=\]\()((?:\.\./)*)docs/", r"\1", markdown)
    return markdown.replace("](../", "](")
