"""Who may import whom: the rooms know the IR and not each other, the IR nothing above it, the driver all."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("passes", "codegen", "patterns", "runtime")


def sources() -> list[Path]:
    """Every source file once: the links inside attncc/ lead to the rooms at the root."""
    found = [p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py"))]
    found += sorted((ROOT / "attncc").glob("*.py")) + sorted((ROOT / "attncc" / "ir").rglob("*.py"))
    return found


def layer(path: Path) -> str:
    """`ir`, the name of a room, or `driver`."""
    parts = path.relative_to(ROOT).parts
    if parts[0] in ROOMS:
        return parts[0]
    return "ir" if parts[:2] == ("attncc", "ir") else "driver"


def imports(source: str) -> list[tuple[int, str]]:
    """(line, dotted module) of each import; a relative one keeps its dots."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # `from attncc import codegen` is an import of attncc.codegen
            found += [(node.lineno, f"{base}.{name.name}" if base == "attncc" else base) for name in node.names]
    return found


def wrong(source: str, own: str) -> list[str]:
    """The imports that `own` must not have."""
    allowed = {"ir": ("ir",), "driver": None}.get(own, ("ir", own))
    bad: list[str] = []
    for line, module in imports(source):
        parts = module.split(".")
        foreign = parts[0] == "attncc" and allowed is not None and (len(parts) < 2 or parts[1] not in allowed)
        if parts[0] in ROOMS or module.startswith(".") or foreign:
            bad.append(f"line {line}: {module}")
    return bad


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_stay_in_their_layer(path: Path) -> None:
    assert wrong(path.read_text(encoding="utf-8"), layer(path)) == []


def test_all_layers_are_walked() -> None:
    assert {layer(path) for path in sources()} == {"ir", "driver", *ROOMS}


@pytest.mark.parametrize(
    ("own", "source"),
    [
        ("codegen", "import attncc.runtime"),
        ("codegen", "from attncc.passes.split import split"),
        ("patterns", "from attncc import passes"),
        ("patterns", "from attncc.report import Site"),
        ("patterns", "import attncc"),
        ("ir", "def late():\n    from attncc.codegen import cpp"),
        ("ir", "from attncc.patterns import lift"),
        ("driver", "import codegen"),
        ("driver", "from . import report"),
        ("runtime", "from .store import Store"),
    ],
)
def test_the_check_sees_a_violation(own: str, source: str) -> None:
    assert len(wrong(source, own)) == 1


@pytest.mark.parametrize(
    ("own", "source"),
    [
        ("codegen", "import attncc.codegen.cpp\nfrom attncc.ir import Attention\nimport torch"),
        ("ir", "from attncc.ir.expr import Expr"),
        ("driver", "from attncc.codegen import cpp\nfrom attncc.passes import split"),
    ],
)
def test_the_check_lets_the_rest_through(own: str, source: str) -> None:
    assert wrong(source, own) == []
