"""`import attncc`, asking for the backend and `explain` leave torch, and what others compiled, as it was."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.convert_frame import input_codes
from torch._dynamo.trace_rules import get_torch_obj_rule_map
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

import attncc

pytestmark = pytest.mark.slow


def entries() -> list[Any]:
    """All that Dynamo holds compiled, for whomever."""
    codes = [code for ref in input_codes.seen if (code := ref()) is not None]
    return [e for code in codes for e in torch._dynamo.eval_frame._debug_get_cache_entry_list(code)]


class Counting:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return gm.forward


class Model(nn.Module):
    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.breaks = breaks
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attend(x) + 1)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        y = F.scaled_dot_product_attention(x, x, x)
        if self.breaks:
            torch._dynamo.graph_break()
        return y * 2


def old_context(x: torch.Tensor) -> torch.Tensor:
    with torch.backends.cuda.sdp_kernel(True, enable_math=True, enable_mem_efficient=False):
        return F.scaled_dot_product_attention(x, x, x).cos()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
    torch._dynamo.reset()


_HELPERS = (torch.nn.modules.transformer._detect_is_causal_mask, F._canonical_mask)
X = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))

IMPORTED = """
import torch
from torch._dynamo.trace_rules import get_torch_obj_rule_map
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable
from torch._dynamo import config, list_backends

def state():
    handlers = dict(TorchInGraphFunctionVariable._get_handlers())
    return dict(get_torch_obj_rule_map()), handlers, config.get_config_copy(), list_backends(None)

before = state()
import attncc
assert state() == before, "import attncc"
import attncc.dynamo, attncc.driver.backend, attncc.driver.explanation
assert state() == before, "import attncc.dynamo"
attncc.backend
rules, handlers, settings, backends = state()
assert (settings, backends) == (before[2], before[3]), "attncc.backend"
helpers = {torch.nn.modules.transformer._detect_is_causal_mask, torch.nn.functional._canonical_mask}
assert rules.keys() - before[0].keys() == helpers
assert handlers.keys() - before[1].keys() == {torch.backends.cuda.sdp_kernel, *helpers}
"""


def test_imports_change_no_rule() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def masked_encoder(*, training: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """A mask that torch compares with a causal one; in training also one of another type, which it warns of."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).train(training)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    hidden = torch.tensor([[False, False, False, True, True], [False] * 5]) if training else None
    return lambda x: encoder(x[0], mask=mask, src_key_padding_mask=hidden)


BREAKING = {
    "old context": (lambda: old_context, ()),
    "encoder": (lambda: masked_encoder(training=False), (_HELPERS[0],)),
    "encoder in training": (lambda: masked_encoder(training=True), _HELPERS),
}


@pytest.mark.parametrize("name", BREAKING)
def test_other_backends_break_the_graph_where_they_did(name: str) -> None:
    handlers, rules = TorchInGraphFunctionVariable._get_handlers(), get_torch_obj_rule_map()
    assert attncc.backend
    make, helpers = BREAKING[name]
    changed = [*helpers] or [torch.backends.cuda.sdp_kernel]
    model = make()

    def graphs() -> tuple[int, int]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        backend = Counting()
        result = torch.compile(model, backend=backend)(X)
        torch.testing.assert_close(result, model(X))
        return backend.graphs, sum(torch._dynamo.utils.counters["graph_break"].values())

    here = graphs()
    taken = [(handlers.pop(x), rules.pop(x) if helpers else None) for x in changed]
    try:
        assert here == graphs()
    finally:
        for x, (handler, rule) in zip(changed, taken, strict=True):
            handlers[x] = handler
            if rule is not None:
                rules[x] = rule
    assert here[1] > 0


@pytest.mark.parametrize("backend", ["attncc", attncc.backend], ids=["by name", "itself"])
@pytest.mark.parametrize("name", BREAKING)
def test_attncc_traces_through_it(backend: Any, name: str) -> None:
    model = BREAKING[name][0]()
    compiled = torch.compile(model, backend=backend, fullgraph=True, options={"inductor": False})
    torch.testing.assert_close(compiled(X), model(X))
    (site,) = attncc.explain(model, X).sites
    assert site.status != "refused"


@contextmanager
def recompiled(backend: Counting) -> Iterator[list[int]]:
    found: list[int] = []
    before = backend.graphs
    yield found
    found.append(backend.graphs - before)


@pytest.mark.parametrize("breaks", [False, True])
def test_what_is_compiled_stays_compiled(breaks: bool) -> None:
    """The model that is explained, another instance of it, and other functions."""
    backend = Counting()
    model, other = Model(breaks), Model(breaks)
    compiled = [torch.compile(f, backend=backend) for f in (model, other, torch.sin)]
    wanted = [f(X) for f in compiled]
    assert backend.graphs
    with recompiled(backend) as count:
        report = attncc.explain(model, X)
        attncc.explain(compiled[0], X)
        for f, y in zip(compiled, wanted, strict=True):
            torch.testing.assert_close(f(X), y)
    assert count == [0]
    assert len(report.sites) == 1


def test_what_dynamo_learnt_of_sizes_stays_learnt() -> None:
    """And what an explanation would have taught it does not come to be known."""
    backend, model = Counting(), Model()
    shorter, longer = X[:, :, :3].contiguous(), torch.cat([X, X], -2)
    attncc.explain(model, longer)
    compiled = torch.compile(model, backend=backend)
    compiled(X)
    assert backend.graphs == 1
    with recompiled(backend) as count:
        compiled(shorter)
    assert count == [1]
    attncc.explain(model, longer)
    with recompiled(backend) as count:
        compiled(longer)  # sizes are symbols since the second one
    assert count == [0]
    shapes = [site.shapes["q"] for x in (X, longer) for site in attncc.explain(model, x).sites]
    assert shapes == [(2, 5, 8), (2, 10, 8)]


@pytest.mark.parametrize("compiled_before", [False, True])
def test_explanations_leave_nothing_behind(compiled_before: bool) -> None:
    backend, model = Counting(), Model(breaks=True)
    if compiled_before:
        torch.compile(model, backend=backend)(X)
    attncc.explain(model, X)

    def held() -> tuple[int, int]:
        return sum(e.code is not None for e in entries()), len(torch._dynamo.eval_frame.cached_backends)

    before = held()
    for _ in range(9):  # more than recompilations are allowed
        assert len(attncc.explain(model, X).sites) == 1
    assert held() == before
    assert compiled_before or not entries()
    if not hasattr(torch._dynamo.eval_frame, "set_eval_frame_isolate_recompiles_id"):
        return  # this version counts them as recompilations
    with recompiled(backend) as count:
        for n in range(2, 6):
            torch.compile(model, backend=backend, dynamic=False)(X[:, :, :n].contiguous())
    assert count[0] >= 4


def test_a_model_that_recompiled_too_often_is_explained() -> None:
    backend, model = Counting(), Model()
    compiled = torch.compile(model, backend=backend, dynamic=False)
    for n in range(1, 12):
        compiled(torch.randn(1, 2, n, 8))
    report = attncc.explain(model, X)
    assert report.sites or any("Dynamo compiled nothing" in note for note in report.notes)


def test_an_explanation_that_fails_leaves_nothing_either() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        F.scaled_dot_product_attention(x, x, x)
        torch._dynamo.graph_break()
        raise KeyError("no such thing")

    backend, model = Counting(), Model()
    compiled = torch.compile(model, backend=backend)
    compiled(X)
    with recompiled(backend) as count:
        with pytest.raises(KeyError, match="no such thing"):
            attncc.explain(fails, X)
        compiled(X)
    assert count == [0]


def test_what_runs_without_graphs_is_said_to() -> None:
    report = attncc.explain(lambda x: x, 3)
    assert report.sites == () and any("Dynamo compiled nothing" in note for note in report.notes)
