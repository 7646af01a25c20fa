"""What becomes of an error that nobody foresaw: it is logged with its traceback, and the model is compiled without it.

`ATTNCC_STRICT=1` in the environment raises such errors instead. The logger is called `attncc`.
"""

from __future__ import annotations

import logging
import os

from attncc.ir.reasons import Reason

STRICT = "ATTNCC_STRICT"

log = logging.getLogger("attncc")
log.addHandler(logging.NullHandler())  # where the program that imports attncc logs nothing, nothing is printed


class EditError(Exception):
    """A graph cannot hold a fused node, for a reason."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


class PlanError(RuntimeError):
    """A plan cannot be made, read or applied. The message is one line that names it and says why."""


def strict() -> bool:
    """Whether unforeseen errors are to be raised: ATTNCC_STRICT is set, and to something else than 0."""
    return os.environ.get(STRICT, "") not in ("", "0")


def unforeseen(doing: str, error: BaseException) -> str:
    """One line for an error that was caught while `doing` something, for a note or a reason. The traceback goes to the
    log. In strict mode the error is raised again."""
    log.error("%s failed", doing, exc_info=error)
    if strict():
        raise error
    return line(error)


def line(error: BaseException) -> str:
    """`KeyError: 'x'`: the type of an error and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
