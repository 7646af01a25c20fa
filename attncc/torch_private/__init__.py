"""Everything of torch that is not public API, in one place, tested against each supported version."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import fx
from torch._functorch import eager_transforms
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import (
    _ProxyTensor,
    _sympy_handlers,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
    set_proxy_slot,
    track_tensor,
)
from torch.utils._python_dispatch import _disable_current_modes

from attncc.torch_private.attention_patterns import guarded
from attncc.torch_private.derivatives import with_derivatives
from attncc.torch_private.distributed import whole_fake
from attncc.torch_private.scatters import sound


def fake_inputs(inputs: Sequence[Any]) -> tuple[FakeTensorMode, list[Any]]:
    """The inputs as fake tensors of the mode that Dynamo traced with, symbolic dimensions included."""
    context = TracingContext.try_get()
    mode = (context.fake_mode if context is not None else None) or detect_fake_mode(list(inputs)) or FakeTensorMode()
    symbolic = {} if context is None else context.tensor_to_context

    def fake(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor):
            return x
        context = symbolic.get(x)
        if context is None:
            return mode.from_tensor(x, static_shapes=True)
        # the source is what ties symbols to those of Dynamo; without it a guard on one has nothing to check
        return mode.from_tensor(x, symbolic_context=context, source=getattr(context, "tensor_source", None))

    return mode, [fake(x) for x in inputs]


def are_fake(inputs: Sequence[Any]) -> bool:
    """Whether a model is called with fake tensors of the caller's own, and not with those of a compilation."""
    context = TracingContext.try_get()
    known = None if context is None else context.fake_mode
    return any(isinstance(x, FakeTensor) and x.fake_mode is not known for x in inputs)


#: Operations that change what shape a tensor itself has: Dynamo's fakes then show the last one.
_RESHAPES = {
    "squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "resize_", "resize_as_", "set_",
    "as_strided_", "requires_grad_", "detach_",
}  # fmt: skip


def fakes_of_dynamo(module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[FakeTensorMode, list[Any]] | None:
    """The fakes that Dynamo ran a graph on, and their mode; None where they do not show the inputs as they are."""
    if any(n.op == "call_method" and n.target in _RESHAPES for n in module.graph.nodes):
        return None
    own = [whole_fake(n.meta.get("example_value")) for n in module.graph.nodes if n.op == "placeholder"]
    pairs = [(mine, given) for mine, given in zip(own, inputs, strict=True) if isinstance(given, torch.Tensor)]
    modes = {mine.fake_mode if isinstance(mine, FakeTensor) else None for mine, _ in pairs}
    mode = modes.pop() if len(modes) == 1 else None
    if mode is None or not all(_shows(mine, given) for mine, given in pairs):
        return None
    return mode, [mine if isinstance(given, torch.Tensor) else given for mine, given in zip(own, inputs, strict=True)]


def _shows(fake: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether a fake tensor has the dtype, shape and strides of a given one; those that are symbols are not asked."""
    if type(fake) is not FakeTensor or fake.layout != torch.strided or given.layout != torch.strided:
        return False
    pairs = zip((*fake.shape, *fake.stride()), (*given.shape, *given.stride()), strict=True)
    return fake.dtype == given.dtype and fake.dim() == given.dim() and all(
        x == y for x, y in pairs if type(x) is int and type(y) is int
    )  # fmt: skip


def trace(run: Callable[..., Any], mode: FakeTensorMode, inputs: Sequence[Any]) -> fx.GraphModule:
    """The pre-dispatch ATen graph of `run` on fake inputs."""
    with mode:
        return make_fx(run, tracing_mode="real", pre_dispatch=True)(*inputs)


def trace_on_fakes(
    run: Callable[..., Any], tensors: Sequence[tuple[Sequence[Any], torch.dtype]], numbers: Sequence[Any],
    device: torch.device,
) -> fx.GraphModule:  # fmt: skip
    """The graph of `run` on fake tensors of some shapes and dtypes on a device and on numbers, which may be symbols of
    the compilation in progress."""
    context = TracingContext.try_get()
    mode = (context.fake_mode if context is not None else None) or FakeTensorMode()
    with tracing(None), mode:
        fakes = [torch.empty(list(shape), dtype=dtype, device=device) for shape, dtype in tensors]
        return make_fx(run, tracing_mode="real")(*fakes, *numbers)


def traced_node(value: Any) -> fx.Node | None:
    """The node that the trace in progress made for a value it returned, if any."""
    mode = get_proxy_mode()
    if mode is None or not isinstance(value, torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
        return None
    slot = get_proxy_slot(value, mode.tracer, None)  # type: ignore[arg-type]
    if callable(slot) and not isinstance(slot, fx.Proxy):  # symbolic numbers keep a thunk
        slot = slot()
    if not isinstance(slot, fx.Proxy):  # a proxy that is asked for an attribute adds a node to the trace
        slot = getattr(slot, "force", lambda: slot)()
    if not isinstance(slot, fx.Proxy):
        slot = getattr(slot, "proxy", slot)
    return slot.node if isinstance(slot, fx.Proxy) else None


def traced_graph() -> fx.Graph:
    """The graph of the trace in progress."""
    mode = get_proxy_mode()
    assert mode is not None
    return mode.tracer.graph


def untraced() -> AbstractContextManager[Any]:
    """Inside, a trace in progress does not see what is made; the mode of its fake tensors stays."""
    return disable_proxy_modes_tracing()


def unobserved() -> AbstractContextManager[Any]:
    """Inside, a trace in progress does not see what is asked of its tensors."""
    return torch._C.DisableTorchFunction()


@contextmanager
def gradients_off() -> Iterator[None]:
    """Gradients off inside, without a trace in progress recording it."""
    before = torch.is_grad_enabled()
    with unobserved():
        torch._C._set_grad_enabled(False)
    try:
        yield
    finally:
        with unobserved():
            torch._C._set_grad_enabled(before)


@contextmanager
def apart() -> Iterator[None]:
    """Inside, operations on tensors made there do what they do in a plain program: no trace, no transform, no mode, no
    autocast and no gradients of whoever is compiling or calling has a part in them."""
    with (
        _disable_current_modes(), torch._C.DisableTorchFunction(), torch._C._DisableFuncTorch(),
        torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False),
    ):  # fmt: skip
        yield


def traced_constant(x: object) -> bool:
    """Whether the trace in progress knows the data of a tensor, or does not know the tensor."""
    mode = get_proxy_mode()
    if mode is None or not isinstance(x, torch.Tensor):
        return True
    slot = get_proxy_slot(x, mode.tracer, None)
    return slot is None or slot.constant is not None


def stands_for(n: fx.Node, x: torch.Tensor) -> None:
    """Let a tensor be, in the trace in progress, what a node of its graph holds."""
    mode = get_proxy_mode()
    assert mode is not None
    tracer: Any = mode.tracer
    sizes = [s for s in (*x.shape, *x.stride(), x.storage_offset()) if isinstance(s, torch.SymInt)]
    if all(_can_be_made(tracer, s.node.expr) for s in sizes):
        set_proxy_slot(x, tracer, _ProxyTensor(fx.Proxy(n, tracer), None))  # sizes are made of their symbols when used
    else:
        track_tensor(x, fx.Proxy(n, tracer), constant=None, tracer=tracer)


def _can_be_made(tracer: Any, x: Any) -> bool:
    """Whether a trace makes a size by itself, of symbols that it knows: not powers, nor products of three factors."""
    if x.is_Integer or x in tracer.sympy_expr_tracker:
        return True
    pairs = len(x.args) == 2 or not x.is_Mul
    return x.func in _sympy_handlers() and pairs and all(_can_be_made(tracer, a) for a in x.args)


#: What a graph calls where a transform of `torch.func` takes a gradient.
AUTOGRAD_GRAD = eager_transforms._autograd_grad
ENTER_AUTOCAST, EXIT_AUTOCAST = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


def enter_autocast(*settings: Any) -> Any:
    """What a node of Dynamo's does where a region of autocast begins. A trace in progress notes it, and would leave it
    at that."""
    region: Any = torch.amp.autocast_mode._UnmanagedAutocast(*settings)
    region.__enter__()
    return region


def exit_autocast(region: Any) -> None:
    """The end of a region that `enter_autocast` began."""
    region.__exit__(None, None, None)


def inside_transform() -> bool:
    """Whether a level of `vmap`, `grad` or another transform is open."""
    return torch._C._functorch.maybe_current_level() is not None  # type: ignore[attr-defined]


def storage(x: torch.Tensor) -> int:
    """What tensors that share memory share."""
    return x.untyped_storage()._cdata


def like(x: torch.Tensor) -> torch.Tensor:
    """A tensor, made inside the trace in progress, of the shape, strides, dtype and device of a Dynamo fake.

    The trace knows symbolic sizes and not what strides are made of them: there, a dense tensor of the same order. It is
    no tensor of a transform's, inside of one either."""
    with temporarily_clear_interpreter_stack():
        return _like(x)


def _like(x: torch.Tensor) -> torch.Tensor:
    strides = x.stride()
    if all(isinstance(s, int) for s in strides):
        return torch.empty_strided(x.size(), strides, dtype=x.dtype, device=x.device)
    hints = [s.node.hint if isinstance(s, torch.SymInt) else s for s in strides]
    order = sorted(range(x.ndim), key=lambda d: -hints[d])
    made = torch.empty([x.size(d) for d in order], dtype=x.dtype, device=x.device)
    return made.permute([order.index(d) for d in range(x.ndim)])


def inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], config: dict[str, Any], told: Callable[[str], object] = str
) -> Callable[..., Any]:  # fmt: skip
    """Inductor's compiled form of a Dynamo graph. `told` gets notes on it, on its backward once that is compiled."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner  # noqa: PLC0415 - takes a second to import

    compiled: Any = compile_fx(gm, list(inputs), sound(compile_fx_inner, told), guarded(config))
    learns = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
    return with_derivatives(compiled, gm.forward, learns=learns)


def inductor_rewrites(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A Dynamo graph as Inductor's own passes leave it, without generating code for it."""
    from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415 - as above

    def as_it_is(rewritten: fx.GraphModule, _: Sequence[Any], **__: Any) -> Callable[..., Any]:
        def call(args: list[Any]) -> Any:
            return rewritten(*args)

        call._boxed_call = True  # type: ignore[attr-defined] # it takes a list that it may empty
        return call

    compiled: Any = compile_fx(gm, list(inputs), inner_compile=as_it_is)  # type: ignore[arg-type]
    return compiled


def fused_by_inductor() -> int:
    """How many attentions Inductor's patterns replaced in this process so far."""
    from torch._dynamo.utils import counters  # noqa: PLC0415 - as above

    return counters["inductor"]["fuse_attention"]


def restarts(error: BaseException) -> bool:
    """Whether an error of Inductor's is how it asks Dynamo to trace again, or to leave a frame alone."""
    from torch._dynamo.exc import RestartAnalysis, SkipFrame  # noqa: PLC0415 - as above

    return isinstance(error, RestartAnalysis | SkipFrame)


def lacks_compiler(error: BaseException | None) -> bool:
    """Whether Inductor gave up because the machine has no C++ compiler."""
    from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415 - as above

    while error is not None and not isinstance(error, InvalidCxxCompiler):
        error = error.__cause__ or error.__context__
    return error is not None


def inductor_apart(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A graph on real tensors compiled by Inductor from inside another compilation, and without a trace in it.

    Left in the outer context it would put symbols of its own among those that Dynamo makes guards from."""
    with tracing(None), torch.no_grad():
        return inductor(gm, inputs, {})


def inductor_apart_with_backward(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The same with its backward, both compiled now: the compilation around counts what is compiled later as its own,
    and objects."""
    from torch._functorch import config  # noqa: PLC0415 - as above

    patched: Any = config
    with tracing(None), torch.enable_grad(), patched.patch(force_non_lazy_backward_lowering=True):
        return inductor(gm, inputs, {})


def inductor_modes() -> dict[str, dict[str, Any]]:
    """Inductor's configuration for each mode of `torch.compile`."""
    from torch._inductor import list_mode_options  # noqa: PLC0415 - as above

    return {name: dict(entries) for name, entries in list_mode_options().items()}


def inductor_options() -> list[str]:
    """The names of the entries of Inductor's configuration, other names of entries included."""
    from torch._inductor import config  # noqa: PLC0415 - as above

    entries: Any = config
    return list(entries._config)


def block_tables(
    mask_mod: Callable[..., torch.Tensor], sizes: Sequence[int], blocks: tuple[int, int], device: torch.device
) -> Sequence[Any]:
    """The tables of the block mask of a function, in the order in which a flex_attention node holds them. `sizes` are
    batch, heads, queries and keys; a table that this kind of mask lacks is None."""
    from torch.nn.attention.flex_attention import create_block_mask  # noqa: PLC0415 - takes as long as Inductor

    return create_block_mask(mask_mod, *sizes, device=str(device), BLOCK_SIZE=blocks).as_tuple()[2:-3]


def artifact(name: str, text: Callable[[], str]) -> None:
    """JSON for the structured trace of torch (`TORCH_TRACE`), which tlparse shows beside a compilation's own. `text` is
    asked for where there is such a trace only."""
    from torch._logging._internal import trace_structured  # noqa: PLC0415 - as below

    trace_structured("artifact", lambda: {"name": name, "encoding": "json"}, payload_fn=text)


def profiling() -> bool:
    """Whether a profiler of torch is running."""
    return torch.autograd.profiler._is_profiler_enabled


#: How Dynamo names the compilation of what lies before a break that it does not count: the start of the name, and what
#: it says of that elsewhere.
_BREAKS = {
    "generic_jump": "Data-dependent branching",
    "step_unsupported": "An instruction that Dynamo does not trace",
    "comprehension_graph_break": "A graph break in a comprehension",
}


def graph_break_places() -> dict[str, list[tuple[str, int]]]:
    """Where this process left a graph so far, as files and lines of the user's code, by Dynamo's reason (its first
    line)."""
    found: dict[str, list[tuple[str, int]]] = {}
    for known in torch._dynamo.utils.graph_break_reasons:
        if known.user_stack:
            at = known.user_stack[-1]
            first = known.reason.splitlines()[0]
            reason = next((says for name, says in _BREAKS.items() if first.startswith(name)), first)
            found.setdefault(reason, []).append((at.filename, at.lineno or 0))
    return found


def graph_breaks() -> Counter[str]:
    """How often this process left a graph so far, by Dynamo's reason (its first line). Branches on data are in no
    counter of Dynamo's, only among the places."""
    found: Counter[str] = Counter()
    for reason, count in torch._dynamo.utils.counters["graph_break"].items():
        found[reason.splitlines()[0]] += count
    for reason, places in graph_break_places().items():
        if reason in _BREAKS.values():
            found[reason] = max(found[reason], len(places))
    return found
