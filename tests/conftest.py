"""What all tests share: golden files and the marker of the long ones."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")
    parser.addoption("--full", action="store_true", help="run the tests marked `full` too")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("ATTNCC_STRICT", "1")  # an error that nobody foresaw fails the test that meets it
    config.addinivalue_line("markers", "full: too long for every change; deselected unless --full or -m asks for it")
    if not config.option.full and not config.option.markexpr:
        config.option.markexpr = "not full"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: `text` is what the file tests/golden/`name` holds, to the byte."""
    update: bool = request.config.getoption("--update-golden")

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.is_file():
            pytest.fail(f"no golden file {name}; run with --update-golden and read what it writes")
        else:
            assert text == path.read_text(encoding="utf-8"), f"{name} differs; --update-golden accepts the new text"

    return check


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that make attncc fail on purpose: what nobody foresaw costs the fused graph, not the model."""
    monkeypatch.setenv("ATTNCC_STRICT", "0")
