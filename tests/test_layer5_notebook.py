"""Layer 5, notebook.ipynb: that it runs, and that it stores what a run gives."""

import base64
import copy
import io
import re

import pytest
from PIL import Image

for package in ("nbformat", "nbclient", "ipykernel"):
    pytest.importorskip(package, reason=f"{package} is missing, of requirements-dev.txt")

import nbformat  # noqa: E402
from make_notebook import NOTEBOOK, run_notebook  # noqa: E402

MOST_BYTES = 1_500_000
NO_TRAINING = {"denoise", "router-figures"}  # cells that print the same again


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def again(stored, tmp_path_factory):
    """The notebook after a run of its own, with one step of training."""
    notebook = copy.deepcopy(stored)
    (cell,) = (cell for cell in notebook.cells if "\nSTEPS = 300\n" in cell.source)
    cell.source = cell.source.replace("STEPS = 300", "STEPS = 1")
    for code in code_cells(notebook):
        code.update(outputs=[], execution_count=None)
    run_notebook(notebook, tmp_path_factory.mktemp("notebook"))
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    """What a cell wrote to stdout; it has to be silent on stderr."""
    streams = [output for output in cell.outputs if output.output_type == "stream"]
    assert {output.name for output in streams} <= {"stdout"}
    return "".join(output.text for output in streams)


def pictures(cell):
    """The sizes of a cell's pictures."""
    encoded = (output.data["image/png"] for output in cell.outputs if "data" in output)
    return [Image.open(io.BytesIO(base64.b64decode(data))).size for data in encoded]


def decimals(text):
    return [float(number) for number in re.findall(r"\d+\.\d\d+", text)]


def test_every_cell_runs(stored, again):
    for notebook in (stored, again):
        cells = code_cells(notebook)
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        kinds = {output.output_type for cell in cells for output in cell.outputs}
        assert kinds == {"stream", "display_data"}  # no error


def test_stored_outputs_are_those_of_a_run(stored, again):
    drawn = 0
    for before, after in zip(code_cells(stored), code_cells(again), strict=True):
        assert pictures(before) == pictures(after), before.id
        assert bool(printed(before)) == bool(printed(after)), before.id
        drawn += len(pictures(before))
    assert drawn == 4
    told = [{cell.id: printed(cell) for cell in code_cells(of)} for of in (stored, again)]
    for name in NO_TRAINING:
        before, after = (decimals(of[name]) for of in told)
        assert len(before) >= 4
        assert after == pytest.approx(before, abs=0.02), name


def test_the_text_has_the_figures_that_cells_print(stored):
    text = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "markdown")
    figures = decimals(" ".join(re.findall(r"\*\*.*?\*\*", text, re.DOTALL)))  # of the findings
    known = {figure for cell in code_cells(stored) for figure in decimals(printed(cell))}
    assert len(figures) > 10
    for figure in figures:
        assert min(abs(figure - other) for other in known) < 0.0051, figure


def test_it_is_small_and_of_no_machine(stored):
    nbformat.validate(stored)
    assert len(NOTEBOOK.read_bytes()) < MOST_BYTES
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert stored.metadata == {"kernelspec": kernel, "language_info": {"name": "python"}}
    assert not any(cell.metadata for cell in stored.cells)
    text = "".join(map(printed, code_cells(stored)))
    assert not re.search(r"\r|(?<!\w)/\w+/|Warning", text)  # bars of progress, paths
