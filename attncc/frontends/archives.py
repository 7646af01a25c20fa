"""What in a .pt2 archive could run code when torch loads it: pickled tensors, and sizes that are no arithmetic.

torch.export.load unpickles tensors of subclasses, and hands the text of symbolic sizes to sympy, which evaluates it as
Python. Files come from anywhere: neither is done for one that holds more than tensors and arithmetic.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: A larger description of a graph is none that is read.
MOST_BYTES = 1 << 30
_ARITHMETIC = re.compile(r"[\w\s+*/(),.<>=|&~%-]*\Z")
_ATTRIBUTE = re.compile(r"__|\.\s*[A-Za-z_]")


def unsafe(path: Path) -> str:
    """Why a .pt2 file is not loaded, in a few words; nothing where it may be. Raises zipfile.BadZipFile, OSError,
    ValueError, KeyError for what is no archive."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if not entry.filename.endswith(".json"):
                continue
            if entry.file_size > MOST_BYTES:
                return f"{entry.filename} is larger than {MOST_BYTES >> 20} MiB"
            found = json.loads(archive.read(entry))
            for key, value in _entries(found):
                if key == "use_pickle" and value:
                    return "it holds pickled tensors, which could run anything"
                if key == "expr_str" and not _is_arithmetic(value):
                    return f"a size in it is no arithmetic: {str(value)[:60]!r}"
    return ""


def _is_arithmetic(text: object) -> bool:
    return isinstance(text, str) and bool(_ARITHMETIC.match(text)) and not _ATTRIBUTE.search(text)


def _entries(x: Any) -> Iterator[tuple[str, Any]]:
    """The key and value of each entry of what JSON says, at any depth."""
    stack = [x]
    while stack:
        x = stack.pop()
        if isinstance(x, dict):
            yield from x.items()
            stack += x.values()
        elif isinstance(x, list):
            stack += x
