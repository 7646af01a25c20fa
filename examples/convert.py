"""A model converted for onnxruntime, and run there:

    python -m examples.convert model.onnx

It needs attncc[onnx]. The command line does the same: `attncc convert examples.convert:model -o model.onnx`.
"""

import sys
from pathlib import Path

import onnxruntime
import torch
from torch import nn

from attncc.convert.convert import Wish, convert


class Layer(nn.Module):
    """(batch, length, 64) -> the same: a causal attention, spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / 4
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(-2))


def model() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Layer().eval(), torch.randn(2, 128, 64)


def main(path: str) -> None:
    done = convert(Wish("examples.convert:model", Path(path), "onnx", dynamic=("batch", "length")))
    print(done.report)
    print(done.checked)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    layer, x = model()
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    print("largest difference:", float((torch.from_numpy(found) - layer(x)).abs().max()))


if __name__ == "__main__":
    main(*sys.argv[1:])
