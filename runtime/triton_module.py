"""Loading the source of a kernel module: Triton reads a kernel's text from its file, so each has one."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType


@lru_cache(maxsize=1)
def _scratch() -> Path:
    """A folder of this process alone; it is left to the system to clean, as Triton may read a file late."""
    return Path(tempfile.mkdtemp(prefix="attncc-triton-"))


def load_module(source: str, folder: Path | None = None) -> ModuleType:
    """The module of `source`, from a file in `folder` that is named by the text's hash. The same text gives the same
    module. Imports Triton."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    name = f"attncc_triton_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    place = folder or _scratch()
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{name}.py"
    if not path.exists() or path.read_text(encoding="utf-8") != source:
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(source, encoding="utf-8")
        partial.replace(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
