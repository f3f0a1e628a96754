"""Notebooks: short, in order, without helpers or widget state, and they run."""

import ast

import nbformat
import pytest
from nbclient import NotebookClient

from g4lens.resources import bundled

NOTEBOOKS = sorted(bundled("notebooks").glob("*.ipynb"))
MOST_CELLS = {"00_start_here.ipynb": 12}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_form(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(notebook.cells) <= MOST_CELLS.get(path.name, 40)
    assert len(code[0].source.splitlines()) <= 3
    assert any(cell.get("outputs") for cell in notebook.cells[:4]), "a result within four cells"
    assert "widgets" not in notebook.metadata
    assert path.stat().st_size < 2_000_000
    for cell in code:
        tree = ast.parse(cell.source)
        assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body)
        assert not any(output.output_type == "error" for output in cell.outputs)
    assert notebook.cells[0].cell_type == "markdown"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_runs_from_top_to_bottom_to_what_it_shows(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    shown = [texts(cell) for cell in notebook.cells]
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    assert [texts(cell) for cell in notebook.cells] == shown


def texts(cell) -> str:
    outputs = cell.get("outputs", [])
    return "".join(output.get("text", "") for output in outputs if output.get("name") == "stdout")
