"""The suite of models with long windows, at sizes that take no time: its forms agree, and no row goes on for ever."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attncc.bench import windows
from attncc.bench.windows import CAPS, MODELS, Limits, Stack, example, line, measured, run, table
from attncc.frontends.targets import TargetError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_flex_is_the_same_model(name: str) -> None:
    n = 1024  # 16 rows of the neighbourhood's image
    x, doc = example(n)
    model = Stack(MODELS[name], CAPS.get(name)).eval()
    want, got = model(x, doc), model.flex(n, doc)(x, doc)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def calls(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    """Peers that take so long, and give what eager gives."""

    def call(peer: str, model: Stack, x: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], torch.Tensor]:
        def sleep() -> torch.Tensor:
            time.sleep(seconds[peer])
            return x[0]

        return sleep

    monkeypatch.setattr(windows, "_call", call)
    monkeypatch.setattr(windows, "_seconds_a_pair", lambda size: 1e-12)


def test_what_takes_too_long_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    calls(monkeypatch, attncc=0.0, eager=0.0, inductor=30.0, flex=0.02)
    last: dict[str, float] = {}
    start = time.monotonic()
    name = "Mistral-like window 1024"
    row = measured(name, 64, windows.PEERS, 3, Limits(seconds=0.01, row_seconds=1.0), last)
    assert time.monotonic() - start < 20
    assert {"attncc", "eager"} <= set(row["ms"]) and row["error"] == 0
    assert "over 1 s" in row["skipped"]["inductor"]
    assert "over 1 s" in line(row) and "over 1 s" in table({"rows": [row]})
    # growth with the square is what a longer row expects
    last["eager"] = 1.0
    longer = measured(name, 8192, ("attncc", "eager"), 1, Limits(seconds=3.0), last)
    assert longer["skipped"] == {"eager": "about 4 s a call"}
    huge = measured(name, 40960, ("attncc", "flex"), 1, Limits(), {})
    assert huge["skipped"] == {"flex": "masks and scores would fill 6.7 GB"} and "attncc" in huge["ms"]


def test_parts_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls(monkeypatch, attncc=0.0, eager=0.0, inductor=0.0, flex=0.0)
    out = tmp_path / "windows.json"
    run(json=out, only="Mistral, Gemma", lengths=[64, 128])
    report = run(json=out, only="Mistral", lengths=[64])
    assert sorted((r["model"][:5], r["length"]) for r in report["rows"]) == [
        ("Gemma", 64), ("Gemma", 128), ("Mistr", 64), ("Mistr", 128)
    ]  # fmt: skip
    assert json.loads(out.read_text())["rows"] == report["rows"]
    with pytest.raises(TargetError, match="no row is called 'nothing'"):
        run(only="nothing")
