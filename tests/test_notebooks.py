"""Every notebook runs from top to bottom."""

from pathlib import Path

import pytest
from helpers import executed_notebook

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, monkeypatch):
    monkeypatch.chdir(path.parent)  # where Jupyter runs it
    executed_notebook(path)
