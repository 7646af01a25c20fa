"""The host side of a kernel file: plain Python that computes the grid and passes strides."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from attncc.codegen.triton.frame import count_of
from attncc.codegen.triton.kernel import Kernel, wrapped
from attncc.codegen.triton.lists import LOOKS
from attncc.codegen.triton.operands import stride
from attncc.codegen.triton.schedule import Schedule
from attncc.ir import Expr, Size, print_expr
from attncc.ir.expr import free

_PROCESSORS = '''
def count_processors(device):
    """Of a GPU; one elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
'''


_SPLITS = '''
def choose_splits(programs, keys, device):
    """How many programs share the keys of one tile: enough to fill the device twice, each with some blocks to walk."""
    if device.type != "cuda":
        return 1
    return max(1, min(2 * count_processors(device) // programs, keys // (4 * BLOCK_N.value), 128))
'''


_BOXES = '''
def aligned(tensor, along, inside, *steps):
    """Whether a descriptor can step `along` keys and `inside` a head: 16-byte boundaries everywhere, no gaps inside."""
    whole = all(step * tensor.element_size() % 16 == 0 for step in (along, *steps))
    return whole and tensor.data_ptr() % 16 == 0 and along > 0 and inside == 1
'''


def launcher(p: Schedule, kernels: tuple[Kernel, ...]) -> str:
    """`SIGNATURES`, `CONTIGUOUS` and `launch(tensors, sizes, outputs)`."""
    main = kernels[0]
    lines = ["#: Triton's types of the arguments of each kernel, in order.", "SIGNATURES = {"]
    for kernel in kernels:
        pairs = [f'"{x.name}": "{x.type}"' for x in kernel.parameters]
        lines += [f'    "{kernel.name}": {{', *wrapped(pairs, "        "), "    },"]
    known = [f'"{x.name}": {x.contiguous}' for x in main.parameters if x.contiguous]
    lines += ["}", "#: What contiguous tensors make of strides: one, or a multiple of 16.", "CONTIGUOUS = {"]
    lines += [*wrapped(known, "    "), "}"]
    if p.split or p.persistent:
        lines += ["", *_PROCESSORS.splitlines()]
    if p.split:
        lines += ["", *_SPLITS.splitlines()]
    if p.descriptors:
        lines += ["", *_BOXES.splitlines()]
    lines += ["", "", f"def launch(tensors, sizes, outputs{', splits=None' if p.split else ''}):"]
    lines += [f"    {x}" for x in _body(p, kernels)]
    return "\n".join(lines)


def _body(p: Schedule, kernels: tuple[Kernel, ...]) -> list[str]:
    a = p.a
    lines = ['"""`tensors`, `sizes` and `outputs` in the order of the attention; outputs have logical dimensions."""']
    names = {t.name: f"tensor_{n}" for n, t in enumerate(a.tensors)}
    lines.append(f"{tuple_text(names.values())} = tensors")
    sizes: dict[Expr, str] = {s: f"size_{s.name}" for s in a.sizes}
    if sizes:
        lines.append(f"{tuple_text(sizes.values())} = sizes")
    lines.append(f"{tuple_text(a.outputs)} = outputs")

    def show(x: Expr) -> str:
        return print_expr(x, {s: sizes[s] for s in free(x) if isinstance(s, Size)})

    lines.append(f"rows, points = {show(p.row_count)}, {show(count_of(p.points))}")
    lines.append("programs = triton.cdiv(rows, BLOCK_M.value) * points")
    lines += ["if programs == 0:", "    return"]
    options = f"num_warps={p.config.warps}, num_stages={p.config.stages}, enable_fp_fusion=True"
    first = a.outputs[0]
    if p.even:
        lines += _even(p, kernels[0], names)
    if p.listed:
        lines += _listed(p, kernels, names, sizes, show)
    if p.descriptors:
        lines += _boxed(p, names, sizes, show)
    if not p.split:
        given = wrapped([*arguments(kernels[0], names, sizes), options], "    ")
        grid = "programs"
        if p.persistent:
            lines.append(f"processors = count_processors({first}.device)")
            grid = f"min(programs, {p.persistent} * processors)"
        return [*lines, f"attention[({grid},)](", *given, ")"]
    return [
        *lines,
        "if splits is None:",
        f"    splits = choose_splits(programs, {show(a.j.extent)}, {first}.device)",
        "part = stat = None",
        "if splits > 1:",
        f'    new = {{"dtype": torch.float32, "device": {first}.device}}',
        f"    part = torch.empty((splits, points, rows, {sum(w for w, _ in p.e_chunks)}), **new)",
        "    stat = torch.empty((2, splits, points, rows), **new)",
        "attention[(programs, splits)](",
        *wrapped([*arguments(kernels[0], names, sizes), options], "    "),
        ")",
        "if splits > 1:",
        "    join[(rows * points,)](",
        *wrapped([*arguments(_named(kernels, "join"), names, sizes), "num_warps=4, enable_fp_fusion=True"], " " * 8),
        "    )",
    ]


def _even(p: Schedule, main: Kernel, names: dict[str, str]) -> list[str]:
    """Whether all rows of the operands lie at the multiples that their head size allows."""
    steps = [_argument(x.value, names, {}) for x in main.steps]
    return ["steps = (", *wrapped(steps, "    "), ")", f"even = all(step % {p.even} == 0 for step in steps)"]


def _named(kernels: tuple[Kernel, ...], name: str) -> Kernel:
    return next(k for k in kernels if k.name == name)


def _listed(
    p: Schedule, kernels: tuple[Kernel, ...], names: dict[str, str], sizes: dict[Expr, str], show: Callable[[Expr], str]
) -> list[str]:
    """The lists of this call: for each batch point that the mask mentions and each tile of rows."""
    looking = [*arguments(_named(kernels, "look"), names, sizes), f"num_warps={p.config.warps}"]
    return [
        f"lists = triton.cdiv(rows, BLOCK_M.value) * {show(count_of(p.list_points))}",
        f"block_count = triton.cdiv({show(p.a.j.extent)}, BLOCK_N.value)",
        f"device = {p.a.outputs[0]}.device",
        "flags = torch.empty((lists, block_count), dtype=torch.uint8, device=device)",
        "blocks = torch.empty((lists, block_count), dtype=torch.int32, device=device)",
        "counts = torch.empty((lists, 2), dtype=torch.int32, device=device)",
        "if block_count:",
        f"    look[(lists, triton.cdiv(block_count, {LOOKS}))](",
        *wrapped(looking, "        "),
        "    )",
        "pack[(lists,)](flags, blocks, counts, block_count, num_warps=4)",
    ]


def _boxed(p: Schedule, names: dict[str, str], sizes: dict[Expr, str], show: Callable[[Expr], str]) -> list[str]:
    """Whether this call's keys and values can be read through descriptors, and where those are kept."""
    tests: list[str] = []
    for o, inner in ((p.k, p.a.d), (p.v, p.a.e)):
        name = names[o.tensor]
        strides: dict[Expr, str] = {
            stride(o.tensor, dim): f"{name}.stride({dim})" for dim in range(len(p.a.tensor(o.tensor).shape))
        }
        steps = [o.along(p.a.j), o.along(inner), *(o.along(x) for x in p.points), o.base]
        texts = [print_expr(x, {**strides, **sizes}) for x in steps]
        tests.append(f"aligned({', '.join([name, *texts])})")
    return [
        f"boxed = {show(p.a.j.extent)} > 0 and {tests[0]}",
        f"boxed = boxed and {tests[1]}",
        "if boxed:  # descriptors are written to memory that Triton asks for",
        f"    device = {p.a.outputs[0]}.device",
        "    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=device))",
    ]


def arguments(kernel: Kernel, names: dict[str, str], sizes: dict[Expr, str]) -> list[str]:
    """What a launcher passes to a kernel."""
    return [_argument(x.value, names, sizes) for x in kernel.parameters]


def tuple_text(names: Iterable[str]) -> str:
    """Names on the left of an assignment from a tuple."""
    text = ", ".join(names)
    return text if "," in text else f"{text},"


def _argument(value: str, names: dict[str, str], sizes: dict[Expr, str]) -> str:
    for tensor, name in names.items():
        value = value.replace(f"tensors[{tensor!r}]", name)
    return sizes.get(Size(value), value)
