"""The demonstration on its real model, as `make demo` runs it."""

import re

import pytest

from attncc.cli import demo


def test_demo(capfd: pytest.CaptureFixture[str]) -> None:
    assert demo.run(rounds=1)
    out = capfd.readouterr().out
    assert re.search(r"model\.encoder\.layer\.\{0-5\}\.attention\.self", out)
    assert re.search(r"6 sites: \d fused, \d kept, 0 refused", out)
    assert "same nearest sentence: 64 of 64" in out
    assert "this is a defect" not in out
