"""Runs a notebook's code cells in order in one fresh namespace, as a kernel would.

Usage: run_notebook.py NOTEBOOK. What a cell ends with is shown as text, and as HTML if it has any.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl


def main(path: Path) -> None:
    """Run every cell; the first error ends it."""
    mpl.use("Agg")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            _run("".join(cell["source"]), f"cell {cell['id']}", namespace)


def _run(source: str, name: str, namespace: dict[str, Any]) -> None:
    tree = ast.parse(source, filename=name)
    last = tree.body[-1] if tree.body else None
    shown = ast.Expression(tree.body.pop().value) if isinstance(last, ast.Expr) else None  # type: ignore[attr-defined]
    exec(compile(tree, name, "exec"), namespace)  # noqa: S102 - the notebook is the project's own
    if shown is not None:
        value = eval(compile(shown, name, "eval"), namespace)  # noqa: S307 - as above
        if value is not None:
            sys.stdout.write(f"{value}\n")
        if hasattr(value, "_repr_html_"):
            sys.stdout.write(f"[{name} is shown as a table: {'<table>' in value._repr_html_()}]\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
