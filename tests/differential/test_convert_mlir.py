"""MLIR by torch-mlir, compiled and run by IREE; neither is part of what `make test` installs."""

from pathlib import Path

import pytest
import torch
from torch import nn

from attncc.convert import convert as converting
from attncc.convert.convert import Wish, convert
from attncc.frontends.targets import Target

pytestmark = pytest.mark.full
pytest.importorskip("torch_mlir")
pytest.importorskip("iree.compiler")


class Layer(nn.Module):
    """Grouped heads, a causal mask, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 32)
        self.register_buffer("scale", torch.tensor(0.3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2) * self.scale
        k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2).repeat_interleave(2, 1) for t in self.kv(x).chunk(2, -1))
        scores = q @ k.transpose(-1, -2)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return (scores.masked_fill(future, float("-inf")).softmax(-1) @ v).transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("dynamic", [(), ("batch", "length")], ids=["static", "dynamic"])
def test_mlir(dynamic: tuple[str, ...], decompose: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converting, "load", lambda text: Target(text, Layer().eval(), (torch.randn(2, 12, 32),)))
    out = tmp_path / "out.mlir"
    done = convert(Wish("m:f", out, "mlir", dynamic=dynamic, decompose=decompose))
    assert done.report.fused == 1
    assert done.checked.startswith(f"checked on {3 if dynamic else 1} set")
    assert out.read_text().count("torch.aten.scaled_dot_product_attention") == (not decompose)


@pytest.mark.parametrize("decompose", [False, True])
def test_linalg(decompose: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converting, "load", lambda text: Target(text, Layer().eval(), (torch.randn(2, 12, 32),)))
    out = tmp_path / "out.mlir"
    done = convert(Wish("m:f", out, "mlir", decompose=decompose, dialect="linalg"))
    assert done.checked.startswith("checked on 1 set")
    text = out.read_text()
    assert "linalg." in text and "torch.aten" not in text
    assert text.count("tm_tensor.attention") == (not decompose)
