"""Who may import whom: every file stands in a room, and imports point from a room to those that it stands on."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("passes", "codegen", "patterns", "runtime")  # at the root; packages of `attncc` through links

#: Each room and the rooms that it stands on. What a room stands on is closed over: `driver` may import `ir`.
STANDS_ON: dict[str, tuple[str, ...]] = {
    "torch_private": (),
    "ir": (),
    "errors": ("ir",),
    "progress": (),
    "environment": (),
    "version": (),
    "patterns.graph": ("ir",),
    "patterns.reader": ("patterns.graph",),
    "patterns.refusals": ("patterns.reader",),
    "patterns.site": ("patterns.reader", "patterns.refusals"),
    "patterns.softmax": ("patterns.site",),
    "patterns.linear": ("patterns.site",),
    "patterns.lift": ("patterns.softmax", "patterns.linear", "patterns.site", "patterns.refusals", "errors"),
    "passes.protocol": ("ir",),
    "passes.bounds": ("ir",),
    "passes.tables": ("passes.bounds",),
    "passes.gradient": ("ir",),
    "passes.rewrites": ("passes.bounds", "passes.protocol"),
    "passes.policies": ("passes.bounds", "passes.protocol"),
    "passes.pipeline": ("passes.rewrites", "passes.policies"),
    "codegen.torch": ("ir",),
    "codegen.cpp": ("ir",),
    "codegen.triton": ("ir",),
    "codegen.onnx": ("ir",),
    "runtime": ("ir", "torch_private"),
    "kernels": (
        "passes.tables", "passes.gradient", "passes.pipeline", "codegen.torch", "codegen.cpp", "codegen.triton",
        "runtime", "progress",
    ),
    "report": ("passes.bounds",),
    "plans.plan": ("passes.pipeline", "errors"),
    "driver": ("plans.plan", "kernels", "patterns.lift", "report", "torch_private", "errors", "version"),
    "attncc": ("driver", "plans"),
    "frontends": ("attncc",),
    "plans": ("driver",),
    "convert": ("frontends", "attncc", "codegen.onnx", "environment"),
    "__main__": ("cli",),
    "cli": ("frontends", "attncc", "convert"),
    "bench": ("frontends", "attncc", "convert"),
}  # fmt: skip


def sources() -> dict[str, Path]:
    """Every source file once, by its module: the links inside attncc/ lead to the folders at the root."""
    own = [p for p in (ROOT / "attncc").rglob("*.py") if p.relative_to(ROOT).parts[1] not in FOLDERS]
    linked = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")]
    return {module(p): p for p in sorted([*own, *linked])}


def module(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "attncc" else ["attncc", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(name: str) -> str:
    """The room of a module: the longest name in the table that it starts with; the files of attncc/ are the driver's
    front door."""
    inner = re.sub(r"^codegen\.torch_\w+", "codegen.torch", name.removeprefix("attncc").lstrip("."))
    parts = inner.split(".")
    found = [r for r in STANDS_ON if parts[: r.count(".") + 1] == r.split(".")]
    return max(found, key=len) if found else "attncc"


def below(own: str) -> set[str]:
    """A room and everything that it stands on."""
    return {own}.union(*(below(r) for r in STANDS_ON[own]))


def imports(source: str, known: set[str]) -> list[tuple[int, str]]:
    """(line, module) of each import of this project's or of a folder at the root; a relative one keeps its dots."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            parts = [f"{base}.{name.name}" for name in node.names]
            found += [(node.lineno, part if part in known or base == "attncc" else base) for part in parts]
    return [(at, name) for at, name in found if name.split(".")[0] in ("attncc", "", *FOLDERS)]


FILES = sources()


def wrong(source: str, own: str) -> list[str]:
    """The imports that a file of the room `own` must not have."""
    allowed = below(own)
    bad: list[str] = []
    for line, name in imports(source, {*FILES}):
        if not name.startswith("attncc") or room(name) not in allowed:
            bad.append(f"line {line}: {name}")
    return bad


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name: str) -> None:
    parents = name.count(".") < 2 and FILES[name].name == "__init__.py" and name.split(".")[-1] in FOLDERS
    own = "ir" if parents else room(name)  # attncc.patterns and its like are empty: they import nothing
    assert wrong(FILES[name].read_text(encoding="utf-8"), own) == []


def arrows() -> dict[str, set[str]]:
    """The files that each file imports, whether at once, late or for types alone."""
    known = {*FILES}
    texts = {name: path.read_text(encoding="utf-8") for name, path in FILES.items()}
    return {name: ({m for _, m in imports(text, known)} & known) - {name} for name, text in texts.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Files of which each imports the next one, the last the first; none if there are no such."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_file_leads_back_to_itself() -> None:
    assert circle(arrows()) == []


def test_the_check_sees_a_circle() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) != []


#: Rooms of patterns that give what the rooms above need in their `__init__`, what those below give among it.
DOORS = tuple(r for r in STANDS_ON if r.startswith("patterns.") and r != "patterns.lift")
MOST_ARROWS = 40


def test_rooms_of_patterns_are_entered_by_their_doors() -> None:
    """And from the room above alone: few arrows, so that a room can be understood, and changed, by itself."""
    between = [(a, b) for a, found in arrows().items() for b in found if room(a) != room(b)]
    inside = [(a, b) for a, b in between if all(room(x).startswith("patterns.") for x in (a, b))]
    aside = [(a, b) for a, b in inside if b != f"attncc.{room(b)}" or room(b) not in STANDS_ON[room(a)]]
    assert aside == []
    assert 0 < len(inside) < MOST_ARROWS


@pytest.mark.parametrize("own", DOORS)
def test_what_a_door_gives_is_no_module(own: str) -> None:
    """`from room import name` would otherwise give the one or the other, by what was imported before."""
    given = import_module(f"attncc.{own}").__all__
    assert len(set(given)) == len(given) > 0
    assert {f"attncc.{own}.{name}" for name in given}.isdisjoint(FILES)


def test_every_room_is_walked() -> None:
    assert {room(name) for name in FILES} == {*STANDS_ON}


def test_no_folder_knows_another() -> None:
    for own in STANDS_ON:
        if (folder := own.split(".")[0]) in FOLDERS:
            assert {r.split(".")[0] for r in below(own)} <= {folder, "ir", "torch_private", "errors"}


@pytest.mark.parametrize(
    ("own", "source"),
    [
        ("codegen.cpp", "import attncc.runtime"),
        ("codegen.cpp", "from attncc.codegen.triton import emit"),
        ("codegen.triton", "from attncc.passes.rewrites.split_axes import split_axes"),
        ("patterns.reader", "from attncc.patterns.site.frames import frame"),
        ("patterns.lift", "from attncc import passes"),
        ("patterns.lift", "from attncc.report.site import Site"),
        ("patterns.lift", "import attncc"),
        ("ir", "def late():\n    from attncc.codegen import cpp"),
        ("ir", "from attncc.patterns import lift"),
        ("driver", "import codegen"),
        ("driver", "from . import report"),
        ("driver", "from attncc.cli import app"),
        ("kernels", "from attncc.driver import backend"),
        ("runtime", "from .store import Store"),
    ],
)
def test_the_check_sees_a_violation(own: str, source: str) -> None:
    assert len(wrong(source, own)) == 1


@pytest.mark.parametrize(
    ("own", "source"),
    [
        ("codegen.cpp", "import attncc.codegen.cpp\nfrom attncc.ir import Attention\nimport torch"),
        ("ir", "from attncc.ir.expr import Expr"),
        ("driver", "from attncc.codegen import cpp\nfrom attncc.passes.rewrites import split_axes"),
    ],
)
def test_the_check_lets_the_rest_through(own: str, source: str) -> None:
    assert wrong(source, own) == []
