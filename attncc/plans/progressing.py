"""What profiling has done so far, kept in a file, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.utils._pytree import tree_leaves

from attncc.errors import log


@dataclass
class Saved:
    """Results by name, written to `path` as they come (nowhere where that is None). `key` says what they are results
    of: a file with another is not read."""

    path: Path | None
    key: str
    results: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def at(cls, path: Path | None, key: str) -> Saved:
        """What a file holds, if it holds results of the same."""
        if path is None or not path.is_file():
            return cls(path, key)
        try:
            found = msgspec.msgpack.decode(path.read_bytes(), type=dict[str, Any])
            return cls(path, key, found["results"] if found.get("key") == key else {})
        except (OSError, KeyError, msgspec.MsgspecError) as error:
            log.warning("%s cannot be read, profiling starts anew: %s", path, error)
            return cls(path, key)

    def keep(self, name: str, value: Any) -> None:
        """Adds a result: numbers, texts, lists and mappings of them."""
        self.results[name] = value
        if self.path is None:
            return
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            part.write_bytes(msgspec.msgpack.encode({"key": self.key, "results": self.results}))
            part.replace(self.path)
        except OSError as error:
            part.unlink(missing_ok=True)
            log.warning("%s cannot be written, an interrupt would lose what was profiled: %s", self.path, error)
            self.path = None

    def done(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def digest(samples: Iterable[Any], *settings: object) -> str:
    """What tells data and settings from others: the first values of every tensor, and its shape."""
    h = hashlib.sha256(repr(settings).encode())
    for sample in samples:
        for x in tree_leaves(dict(sample) if isinstance(sample, Mapping) else sample):
            if isinstance(x, torch.Tensor):
                flat = x.detach().reshape(-1)[:4096].to("cpu")
                flat = flat.float() if flat.dtype in (torch.bfloat16, torch.float16) else flat
                h.update(repr((str(x.dtype), tuple(x.shape))).encode() + flat.contiguous().numpy().tobytes())
            else:
                h.update(repr(x).encode())
    return h.hexdigest()[:16]
