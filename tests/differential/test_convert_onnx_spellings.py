"""Layers whose axes lie in other dimensions than operators want them: ONNX to ONNX, equal in onnxruntime."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from attncc.convert.convert import Wish, convert


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.places = nn.Linear(32, 96), nn.Parameter(torch.randn(10, 8))


class SharedByAnAxis(Layer):
    """Grouped heads: those of a group are a dimension of their own."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x)[..., :64].split([32, 16, 16], -1)
        q = q.view(b, n, 2, 2, 8).permute(0, 2, 3, 1, 4)
        k, v = (t.view(b, n, 2, 1, 8).permute(0, 2, 3, 1, 4) for t in (k, v))
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        s = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(hidden, float("-inf"))
        return (s.softmax(-1) @ v).permute(0, 3, 1, 2, 4).reshape(b, n, 32)


class TokensFirst(Layer):
    """Tokens before the batch, heads side by side in one dimension until they are read, as nn.MultiheadAttention."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x.transpose(0, 1)).chunk(3, -1)
        q, k, v = (t.reshape(n, b * 4, 8).transpose(0, 1) for t in (q, k, v))
        weights = torch.bmm(q * 8**-0.5, k.transpose(1, 2)).softmax(-1)
        return torch.bmm(weights, v).transpose(0, 1).reshape(n, b, 32).transpose(0, 1)


class Skewed(Layer):
    """Relative positions by padding and reshaping, and the sum of both divided (Huang et al., 2018, arXiv 1809.04281).
    """

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 4, 8).permute(2, 0, 3, 1, 4)
        far = F.pad(q @ self.places.T, (1, 0)).reshape(b, 4, n + 1, n)[:, :, 1:]
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        s = ((q @ k.transpose(-1, -2) + far) / 8**0.5).masked_fill(hidden, float("-inf"))
        return (s.softmax(-1) @ v).transpose(1, 2).reshape(b, n, 32)


LAYERS: dict[type[Layer], tuple[dict[int, str], str]] = {
    SharedByAnAxis: ({0: "batch", 1: "length"}, "GroupQueryAttention"),
    TokensFirst: ({0: "batch", 1: "length"}, "Attention"), Skewed: ({0: "batch"}, "GroupQueryAttention"),
}  # fmt: skip


@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda x: x.__name__)
def test_layers(layer: type[Layer], target: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    axes, became = LAYERS[layer]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(layer().eval(), (torch.randn(2, 10, 32),), str(source), dynamo=False, opset_version=17,
                          input_names=["x"], dynamic_axes={"x": axes})  # fmt: skip
    done = convert(Wish(str(source), out, "onnx", measure=False, target=target))  # type: ignore[arg-type]
    assert [s.became for s in done.report.sites] == [became if target == "onnxruntime" else "Attention"]
    assert done.checked.startswith("checked on 3")
