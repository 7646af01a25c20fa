"""Row 25, ConnNet (weakly specified): a non-local block (arXiv 1711.07971) in a convolutional network."""

from __future__ import annotations

from torch import Tensor, nn

from attncc.bench.systems.system import Made, System, drawn, settled


class NonLocal(nn.Module):
    """Embedded Gaussian, no scale."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(dim, inner, 1) for _ in range(3))
        self.out = nn.Conv2d(inner, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g = self.theta(x).flatten(2), self.phi(x).flatten(2), self.g(x).flatten(2)
        weights = (theta.transpose(1, 2) @ phi).softmax(-1)
        y = (weights @ g.transpose(1, 2)).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])
        return x + self.out(y)


def _make(full: bool) -> Made:
    dim, inner, side = (128, 64, 48) if full else (8, 4, 5)
    return settled(NonLocal(dim, inner), *drawn((1, dim, side, side)))


SYSTEMS = (System(25, "ConnNet", "non-local block", "exact", _make, 1, trains=True),)
