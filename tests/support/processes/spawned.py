"""A function of a file in tests/distributed, run in several processes."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

PROGRAMS = Path(__file__).parents[2] / "distributed"


def _entry(rank: int, file: str, name: str, world: int, folder: str, results: Any) -> None:
    sys.path.insert(0, str(PROGRAMS))  # each process finds the file anew
    getattr(import_module(file), name)(rank, world, folder, results)


def run(file: str, name: str, world: int, folder: Path) -> dict[Any, Any]:
    """What the processes, of which `world` are started, put into the results that they share."""
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.start_processes(_entry, (file, name, world, str(folder), results), world, start_method="spawn")
        return dict(results)
