"""What makes a site of ``docs``: files that pages link to, the pages on SLURM and adapters, links of docstrings."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ["examples/slurm/README.md", "examples/adapters/README.md"]
_ROLE = re.compile(r":(?:class|func|attr|meth|mod):<code>(~?)([\w.]+)</code>")
_LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)#:\s]+)(#[^)]*)?\)")


def _place(uri: str) -> str:
    """Where in the repository a page of the site is."""
    return uri if uri in PAGES else f"docs/{uri}"


def _target(page: str, link: str) -> str:
    """Where in the repository a link leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(_place(page)), link))


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside of ``docs``, and every file that a page links to."""
    for page in PAGES:
        files.append(File.generated(config, page, abs_src_path=str(ROOT / page)))
    for page in [file for file in files if file.is_documentation_page()]:
        for _, _, link, _ in _LINK.findall((ROOT / _place(page.src_uri)).read_text(encoding="utf-8")):
            target = _target(page.src_uri, link)
            shown = target.startswith("docs/") or target in PAGES or files.get_file_from_path(target)
            if not shown and (ROOT / target).is_file() and not target.endswith(".md"):
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Let links lead to where the site has their targets; those to what it does not have become plain text."""

    def moved(link: re.Match[str]) -> str:
        image, text, to, anchor = link.groups()
        target = _target(page.file.src_uri, to).removeprefix("docs/")
        if not (ROOT / _target(page.file.src_uri, to)).exists():
            return link[0]  # left for the build to complain about
        if files.get_file_from_path(target) is None:
            return text
        here = posixpath.dirname(page.file.src_uri) or "."
        return f"{image}[{text}]({posixpath.relpath(target, here)}{anchor or ''})"

    return _LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Make links of the Sphinx roles of docstrings, and let 1.0 ± 0.1 stay on one line."""

    def linked(role: re.Match[str]) -> str:
        short, name = role.groups()
        shown = name.rpartition(".")[2] if short else name
        return f'<autoref identifier="{name}" optional><code>{shown}</code></autoref>'

    return _ROLE.sub(linked, html).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
