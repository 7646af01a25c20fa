"""The notebooks run from top to bottom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import attncc

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")
def test_a_notebook_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "notebook"}
    cells = [x for x in json.loads(path.read_text())["cells"] if x["cell_type"] == "code"]
    for cell in cells:
        assert not cell["outputs"], "notebooks are kept without outputs"
        exec(compile("".join(cell["source"]), f"{path.name}:{cell['id']}", "exec"), names)
    plan = names["plan"]
    assert isinstance(plan, attncc.Plan)
    assert names["off"]["exact"] < 1e-6
    assert str(plan) in capsys.readouterr().out


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
