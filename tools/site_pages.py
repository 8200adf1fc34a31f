"""What the site has beside docs/: the README as its first page, the changes, the examples, pictures of benchmarks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parents[1]
# in the repository: in the site
MOVED = {"README.md": "index.md", "CHANGELOG.md": "changes.md", "CONTRIBUTING.md": "contributing.md"}
NOT_RUN = re.compile("<!-- not run: (.+) -->")
LINK = re.compile(r"\[([^\[\]]*)\]\(((?!https?:)[\w./-]+)(#[\w-]+)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages; a hook of mkdocs."""
    for source, page in MOVED.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for example in (ROOT / "examples").glob("*.*"):
        language = "yaml" if example.suffix == ".yaml" else "python"
        text = f"# {example.name}\n\n```{language}\n{example.read_text(encoding='utf-8')}```\n"
        page = File.generated(config, f"examples/{example.stem}.md", content=text)
        page.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(page)
    for picture in (ROOT / "benchmarks" / "results").glob("*/*.png"):
        name = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **context: Any) -> str:
    """Links out of docs/ go to the added pages, or are plain text. It is said what is not run. A hook of mkdocs."""
    return LINK.sub(_in_the_site, NOT_RUN.sub(r"*Not run as it stands: \1.*\n", markdown))


def _in_the_site(link: re.Match[str]) -> str:
    text, anchor = link[1], link[3] or ""
    path = link[2].removeprefix("../").removeprefix("docs/")
    if path.startswith("examples/"):
        path = f"examples/{Path(path).stem}.md"
    elif path.startswith(("packsft/", "tests/", "kernels/", "tools/")):
        return text
    return f"[{text}]({MOVED.get(path, path)}{anchor})"
