"""Graph breaks since a moment, as notes of a report."""

from __future__ import annotations

from attncc import torch_private
from attncc.driver.describe import short_path


class Breaks:
    """Those from now on."""

    def __init__(self) -> None:
        self._before = torch_private.graph_breaks()
        self._places = {reason: len(at) for reason, at in torch_private.graph_break_places().items()}

    def notes(self) -> list[str]:
        """One for each of Dynamo's reasons, with the lines of the user's code where the graph was left."""
        places = torch_private.graph_break_places()
        found: list[str] = []
        for reason, count in (torch_private.graph_breaks() - self._before).items():
            new = places.get(reason, [])[self._places.get(reason, 0) :]
            lines = dict.fromkeys(f"{short_path(file)}:{line}" for file, line in new)
            where = f" at {', '.join(lines)}" if lines else ""
            times = "" if count == 1 else f", {count} times"
            found.append(
                f"a graph break{where}{times}: {reason}; attention that runs outside the graphs is not seen"
            )
        return found
