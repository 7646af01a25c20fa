"""What a user can act on and the runtime found on the way: the driver takes it, and reports each once."""

from __future__ import annotations

import logging
from collections import deque

_log = logging.getLogger(__name__)
#: At most; where nobody takes them, the oldest go.
_found: deque[str] = deque(maxlen=64)


def notice(text: str) -> None:
    """Report `text` with the next compilation, or this one."""
    _log.info("%s", text)
    _found.append(text)


def taken() -> list[str]:
    """What was found since this was asked last."""
    texts: list[str] = []
    while _found:
        texts.append(_found.popleft())
    return list(dict.fromkeys(texts))
