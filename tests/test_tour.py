"""docs/tour.ipynb runs from its first cell to its last one, offline, and prints what it promises."""

import nbclient
import nbformat

from runs import ROOT


def test_the_notebook():
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("--epochs 8", "--epochs 1 --repeats 0.2")  # the same cells, sooner
    where = {"metadata": {"path": str(ROOT / "docs")}}
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()) if "name" in output
    )
    assert printed.count("Test accuracy") == 4 and "Warning" not in printed
    assert "late  block 3: CLS 0 | patches 1..64 | registers 65..66 (67 tokens)" in printed
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert len(pictures) == 2
