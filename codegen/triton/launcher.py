"""The host side of a kernel file: plain Python that computes the grid and passes strides."""

from __future__ import annotations

from collections.abc import Iterable

from attncc.codegen.triton.forward import Kernel, wrapped
from attncc.codegen.triton.frame import Plan
from attncc.ir import Const, Expr, Size, print_expr
from attncc.ir.build import mul
from attncc.ir.expr import free

_SPLITS = '''
def choose_splits(programs, keys, device):
    """How many programs share the keys of one tile: enough to fill the device twice, each with some blocks to walk."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(2 * processors // programs, keys // (4 * BLOCK_N.value), 128))
'''


def launcher(p: Plan, kernels: tuple[Kernel, ...]) -> str:
    """`SIGNATURES`, `CONTIGUOUS` and `launch(tensors, sizes, outputs)`."""
    main = kernels[0]
    lines = ["#: Triton's types of the arguments of each kernel, in order.", "SIGNATURES = {"]
    for kernel in kernels:
        pairs = [f'"{x.name}": "{x.type}"' for x in kernel.parameters]
        lines += [f'    "{kernel.name}": {{', *wrapped(pairs, "        "), "    },"]
    known = [f'"{x.name}": {x.contiguous}' for x in main.parameters if x.contiguous]
    lines += ["}", "#: What contiguous tensors make of strides: one, or a multiple of 16.", "CONTIGUOUS = {"]
    lines += [*wrapped(known, "    "), "}"]
    if p.split:
        lines += ["", *_SPLITS.splitlines()]
    lines += ["", "", f"def launch(tensors, sizes, outputs{', splits=None' if p.split else ''}):"]
    lines += [f"    {x}" for x in _body(p, kernels)]
    return "\n".join(lines)


def _body(p: Plan, kernels: tuple[Kernel, ...]) -> list[str]:
    a = p.a
    lines = ['"""`tensors`, `sizes` and `outputs` in the order of the attention; outputs have logical dimensions."""']
    names = {t.name: f"tensor_{n}" for n, t in enumerate(a.tensors)}
    lines.append(f"{_tuple(names.values())} = tensors")
    sizes: dict[Expr, str] = {s: f"size_{s.name}" for s in a.sizes}
    if sizes:
        lines.append(f"{_tuple(sizes.values())} = sizes")
    lines.append(f"{_tuple(a.outputs)} = outputs")
    points: Expr = Const(1)
    for axis in p.points:
        points = mul(points, axis.extent)

    def show(x: Expr) -> str:
        return print_expr(x, {s: sizes[s] for s in free(x) if isinstance(s, Size)})

    lines.append(f"rows, points = {show(p.row_count)}, {show(points)}")
    lines.append("programs = triton.cdiv(rows, BLOCK_M.value) * points")
    lines += ["if programs == 0:", "    return"]
    common = [_argument(x.value, names, sizes) for x in kernels[0].parameters if x.value not in _SPLIT_ARGUMENTS]
    options = f"num_warps={p.config.warps}, num_stages={p.config.stages}, enable_fp_fusion=True"
    if not p.split:
        return [*lines, "attention[(programs,)](", *wrapped([*common, options], "    "), ")"]
    any_tensor = a.outputs[0]
    lines += [
        "if splits is None:",
        f"    splits = choose_splits(programs, {show(a.j.extent)}, {any_tensor}.device)",
        "part = stat = None",
        "if splits > 1:",
        f"    new = {{'dtype': torch.float32, 'device': {any_tensor}.device}}",
        f"    part = torch.empty((splits, points, rows, {sum(w for w, _ in p.e_chunks)}), **new)",
        "    stat = torch.empty((2, splits, points, rows), **new)",
        "attention[(programs, splits)](",
        *wrapped([*common, "part", "stat", "splits > 1", options], "    "),
        ")",
        "if splits > 1:",
        "    join[(rows * points,)](",
        *wrapped([*common, "part", "stat", "splits", "num_warps=4, enable_fp_fusion=True"], "        "),
        "    )",
    ]
    return [x.replace("'", '"') for x in lines]


def _tuple(names: Iterable[str]) -> str:
    text = ", ".join(names)
    return text if "," in text else f"{text},"


_SPLIT_ARGUMENTS = ("part", "stat", "splits", "splits > 1")


def _argument(value: str, names: dict[str, str], sizes: dict[Expr, str]) -> str:
    for tensor, name in names.items():
        value = value.replace(f"tensors[{tensor!r}]", name)
    return sizes.get(Size(value), value)
