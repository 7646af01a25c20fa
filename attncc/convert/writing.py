"""Writing a result: whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attncc.frontends.targets import TargetError, one_line


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A folder beside `path` that holds a file of its name, and files beside that, while it is being written; at the
    end they take the places of those that were there. Nothing is left where the block raises.

    The file of the name itself comes last: who finds it finds what it refers to. Raises TargetError where the folder
    cannot be written to."""
    if path.is_dir():
        raise TargetError(f"{path}: is a folder; name a file")
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise TargetError(f"{path}: cannot be written ({one_line(error)})") from error
    try:
        yield folder / path.name
        made = sorted(folder.iterdir(), key=lambda x: x.name == path.name)
        for file in made:
            file.replace(path.parent / file.name)
    except OSError as error:
        raise TargetError(f"{path}: cannot be written ({one_line(error)})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
