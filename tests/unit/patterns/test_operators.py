"""What is asked of an operator's schema."""

from __future__ import annotations

from random import Random

import pytest
import torch
from reading.asked import Asked

from attncc.patterns.graph.operators import (
    argument,
    dim_argument,
    has_argument,
    hint,
    is_operator,
    op_name,
    scaled_by,
    spelled_out,
    storage_id,
    takes_tensors,
    written_args,
)

aten = torch.ops.aten


def test_letters_are_those_that_torch_sums_by() -> None:
    """An equation written out gives what the short one gives."""
    random = Random(0)
    size = dict(zip("abcde", (2, 3, 4, 5, 6), strict=True))
    for _ in range(100):
        left, right = (random.sample("abcde", random.randrange(1, 4)) for _ in range(2))
        out = [c for c in dict.fromkeys(left + right) if (c in left) != (c in right) or random.random() < 0.5]
        random.shuffle(out)
        dots = random.choice(("", "...", "both"))
        batch = [2, 3][: random.randrange(3)] if dots else []
        other = batch[random.randrange(len(batch) + 1) :] if dots == "both" else []
        front = ("..." if dots else "", "..." if dots == "both" else "")
        x = torch.randn([*batch, *(size[c] for c in left)])
        y = torch.randn([*other, *(size[c] for c in right)])
        equation = f"{front[0]}{''.join(left)}, {front[1]}{''.join(right)}"
        if random.random() < 0.7:
            equation += f" -> {'...' if dots else ''}{''.join(out)}"
        first, second, result = spelled_out(equation, x.ndim, y.ndim)
        torch.testing.assert_close(torch.einsum(f"{first},{second}->{result}", x, y), torch.einsum(equation, x, y))


def test_arguments_by_name() -> None:
    def call(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            aten.softmax.int(x, -1), aten.add.Tensor(x, x, alpha=2), x * 3, x / 4, x.clone().mul_(x), x.relu(),
            aten.narrow(x, -2, 0, 1),
        )  # fmt: skip

    of = Asked(call, torch.randn(2, 3))
    softmax, added, tripled, quarter, written, relu, narrowed = of.results
    assert argument(softmax, "dim") == -1 and argument(softmax, "dtype") is None
    assert argument(added, "alpha") == 2 and has_argument(added, "alpha") and not has_argument(relu, "alpha")
    assert dim_argument(narrowed, 2) == 0
    with pytest.raises(KeyError, match="no argument alpha"):
        argument(relu, "alpha")
    assert (scaled_by(tripled), scaled_by(quarter), scaled_by(added), scaled_by(relu)) == (3.0, 0.25, None, None)
    assert written_args(written) == [written.args[0]] and not written_args(added)
    assert op_name(written) == "mul_" and is_operator(written)
    assert not is_operator(next(n for n in of.facts.nodes if n.op == "placeholder"))


def test_metadata_is_no_write() -> None:
    of = Asked(lambda x: x.clone().unsqueeze_(0).transpose_(0, 1), torch.randn(2, 3))
    assert not any(written_args(n) for n in of.facts.nodes)


def test_overloads_for_plain_numbers() -> None:
    assert takes_tensors(aten.pow.Scalar) and takes_tensors(aten.clamp.Tensor) and takes_tensors(aten.add.Tensor)
    assert not takes_tensors(aten.exp.Scalar) and not takes_tensors(aten.add.default)


def test_sizes_have_the_hints_of_the_example() -> None:
    of = Asked(lambda x: x[:, :1] * 2, torch.randn(4, 7), symbolic=True)
    shape = of.results[0].meta["val"].shape
    assert not isinstance(shape[0], int) and [hint(s) for s in shape] == [4, 1] and hint(5) == 5


def test_memory_that_is_shared() -> None:
    x = torch.randn(4, 4)
    assert storage_id(x) == storage_id(x[1:]) != storage_id(x.clone())
    assert storage_id(3) is None and storage_id(x.to_sparse()) is None
