"""Run the notebooks of docs/ and keep what they print, for the site to show: `make notebooks`."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"


def main() -> None:
    """Run every notebook in place."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = run_notebook(path)
        nbformat.write(notebook, path)
        sys.stdout.write(f"{path.name}: {len(notebook.cells)} cells\n")


def run_notebook(path: Path) -> nbformat.NotebookNode:
    """Return a notebook with the output of its cells as it is now; raises CellExecutionError where one fails."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False).execute()
    for cell in notebook.cells:
        # What libraries log differs from day to day, and has paths of this machine.
        cell["outputs"] = [each for each in cell.get("outputs", []) if each.get("name") != "stderr"]
        if cell.cell_type != "code":
            del cell["outputs"]
    return notebook


if __name__ == "__main__":
    main()
