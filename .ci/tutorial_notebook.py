"""Make the notebook of docs/language-model.md: its text, a cell for every file and one for every block of commands.

Run:  python .ci/tutorial_notebook.py > examples/language_model.ipynb
"""

import json
import re
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "language-model.md"
BLOCK = re.compile(r'^```(python|bash|yaml)(?: title="([^"]+)")?\n(.*?)^```\n', re.DOTALL | re.MULTILINE)
# The notebook's kernel is in an environment of its own.
FOLDER = """# The commands are those of the repository's folder, wherever this notebook is opened.
import os
from pathlib import Path

os.chdir(next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "constraints.txt").exists()))"""
INSTALL = {"python3 -m venv .venv && . .venv/bin/activate\n": "", "pip install": "%pip install"}


def cells(page: str) -> list[tuple[str, str]]:
    """Kind and text of each cell."""
    found, end = [], 0
    for block in BLOCK.finditer(page):
        language, title, body = block.groups()
        found.append(("markdown", page[end : block.start()].strip()))
        if title:
            body = f"%%writefile {title}\n{body}"
        elif "pip install" in body:
            if not any(kind == "code" for kind, _ in found):
                found.append(("code", FOLDER))
            for before, after in INSTALL.items():
                body = body.replace(before, after)
        elif language == "bash":
            body = f"%%bash\n{body}"
        found.append(("code", body.rstrip("\n")))
        end = block.end()
    found.append(("markdown", page[end:].strip()))
    # The page's links are to its neighbours.
    links = re.compile(r"\]\((?!https:)([^)#]+)")
    return [(kind, links.sub(r"](../docs/\1", text) if kind == "markdown" else text) for kind, text in found if text]


def notebook(page: str) -> str:
    """The notebook as a file's text."""
    made = []
    for number, (kind, text) in enumerate(cells(page)):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
        made.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(notebook(PAGE.read_text(encoding="utf-8")))
