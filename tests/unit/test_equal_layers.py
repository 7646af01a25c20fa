"""What equal layers share is found once: work is counted, for few layers and for many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from parameters.thinned import thinned
from torch import fx

from attncc.driver import backend, describe, rewriting, selection
from attncc.ir.reasons import because
from attncc.kernels import build
from attncc.patterns.reader.value import Reader

pytestmark = pytest.mark.slow

COUNTED = [
    (build, "fold_predicates"), (build, "loop_bounds"), (build, "spanned"), (build.cpp, "emit"),
    (rewriting, "standard"), (rewriting, "print_attention"), (describe, "area"), (describe, "draw"),
    (selection, "trial"),
]  # fmt: skip


def work(layers: int, implementation: str, dynamic: bool | None, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each analysis ran for a model of so many layers, in a process that has seen nothing yet."""
    for cached in (build._built, build.optimise, rewriting._run_passes, rewriting._text, describe.extent_of):
        cached.cache_clear()
    selection._decided.clear()
    counts: Counter[str] = Counter()

    def counting(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return plain(*args, **kwargs)

        return counted

    def read(self: Reader, n: fx.Node, at: Any, when: int) -> Any:
        counts["masks read"] += self.facts.is_tensor(n) and self.facts.dtype(n) == torch.bool
        return plain_read(self, n, at, when)

    plain_read = Reader._read
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, intermediate_size=16,
        vocab_size=50, attn_implementation=implementation,
    )  # fmt: skip
    model = transformers.LlamaModel(config).eval()
    found = backend.Collected()
    token = backend.collecting.set(found)
    torch._dynamo.reset()
    with monkeypatch.context() as patch, torch.no_grad():
        for module, name in COUNTED:
            patch.setattr(module, name, counting(name, getattr(module, name)))
        patch.setattr(Reader, "_read", read)
        patch.setattr(selection, "_measure", lambda *args: selection.Choice(True, None, because("measuring-off")))
        try:
            torch.compile(model, backend="attncc", dynamic=dynamic, options={"inductor": False})(
                torch.randint(1, 40, (2, 16)), use_cache=False
            )
        finally:
            backend.collecting.reset(token)
    assert [s.status for s in found.sites] == ["fused"] * layers
    return counts


@pytest.mark.parametrize(("implementation", "dynamic"), thinned(["sdpa", "eager"], [None, True]))
def test_the_mask_of_all_layers_is_analysed_once(
    implementation: str, dynamic: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (work(layers, implementation, dynamic, monkeypatch) for layers in (2, 6))
    assert many == few
    assert few["masks read"] > 0 and all(few[name] for _, name in COUNTED)
