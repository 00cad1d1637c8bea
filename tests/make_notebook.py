"""Runs notebook.ipynb in a copy of the repository; as a command, writes it with its outputs."""

import os
import shutil
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebook.ipynb"
ROOMS = ("common", "experiment", "images", "layers", "models", "studies")


def run_notebook(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Runs a notebook in a folder, which gets a copy of the scripts, and stores its outputs in it.

    Raises a CellExecutionError where a cell does.
    """
    for room in ROOMS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / room, folder / room, ignore=ignored)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    # No kernel that is installed, but this Python; no settings of a user, such as of figures; one
    # thread, since others work beside it.
    manager = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    environment = os.environ | {"IPYTHONDIR": str(folder / "ipython"), "OMP_NUM_THREADS": "1"}
    environment.pop("MPLBACKEND", None)
    where = {"metadata": {"path": str(folder)}}
    how = {"record_timing": False, "coalesce_streams": True}
    client = NotebookClient(notebook, manager, resources=where, **how)
    client.execute(env=environment, cleanup_kc=True)
    notebook.metadata.language_info = {"name": "python"}  # of any version


if __name__ == "__main__":
    made = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as place:
        run_notebook(made, Path(place))
    nbformat.validate(made)
    nbformat.write(made, NOTEBOOK)
