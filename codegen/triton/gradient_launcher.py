"""The host side of a backward's file: scratch memory, three launches, and sums over what programs gave."""

from __future__ import annotations

from attncc.codegen.triton.frame import count_of
from attncc.codegen.triton.gradient_frame import STATISTICS, Side
from attncc.codegen.triton.kernel import Kernel, wrapped
from attncc.codegen.triton.launcher import arguments, tuple_text
from attncc.codegen.triton.lists import LOOKS
from attncc.ir import Expr, Size, print_expr
from attncc.ir.attention_grad import AttentionGrad
from attncc.ir.expr import free

#: Programs that share the tiles of a batch point where each keeps sums for every distance.
SHARES = 16


def gradient_launcher(g: AttentionGrad, rows: Side, keys: Side, kernels: tuple[Kernel, ...]) -> str:
    """`SIGNATURES`, `CONTIGUOUS` and `launch(tensors, sizes, outputs)`."""
    lines = ["#: Triton's types of the arguments of each kernel, in order.", "SIGNATURES = {"]
    for kernel in kernels:
        pairs = [f'"{x.name}": "{x.type}"' for x in kernel.parameters]
        lines += [f'    "{kernel.name}": {{', *wrapped(pairs, "        "), "    },"]
    known = dict.fromkeys(f'"{x.name}": {x.contiguous}' for k in kernels for x in k.parameters if x.contiguous)
    lines += ["}", "#: What contiguous tensors make of strides: one, or a multiple of 16.", "CONTIGUOUS = {"]
    lines += [*wrapped(list(known), "    "), "}", "", "", "def launch(tensors, sizes, outputs):"]
    return "\n".join([*lines, *(f"    {x}" for x in _Body(g, rows, keys, kernels).lines())])


class _Body:
    def __init__(self, g: AttentionGrad, rows: Side, keys: Side, kernels: tuple[Kernel, ...]) -> None:
        self.g, self.rows, self.keys = g, rows, keys
        self.kernels = {k.name: k for k in kernels}
        a = rows.p.a
        self.names = {t.name: f"tensor_{n}" for n, t in enumerate(a.tensors)}
        self.sizes: dict[Expr, str] = {s: f"size_{s.name}" for s in a.sizes}

    def show(self, x: Expr) -> str:
        return print_expr(x, {s: self.sizes[s] for s in free(x) if isinstance(s, Size)})

    def lines(self) -> list[str]:
        g, a = self.g, self.rows.p.a
        outputs = [*(f"d{n}" for n in g.operands), *(f"gradient{n}" for n in range(len(g.loads)))]
        lines = ['"""`tensors` are those of the attention, the gradients and the outputs; see the head of the file."""']
        lines.append(f"{tuple_text(self.names.values())} = tensors")
        if self.sizes:
            lines.append(f"{tuple_text(self.sizes.values())} = sizes")
        lines.append(f"{tuple_text(outputs)} = outputs")
        points = "".join(f"{self.show(x.extent)}, " for x in a.batch)
        lines.append(f"points, rows, keys = ({points.rstrip()}), {self.show(a.i.extent)}, {self.show(a.j.extent)}")
        lines.append("if 0 in (*points, rows, keys):")
        lines += ["    for output in outputs:", "        output.zero_()", "    return"]
        lines.append(f'new = {{"dtype": torch.float32, "device": {outputs[0]}.device}}')
        lines.append(f"{', '.join(STATISTICS)} = torch.empty(({len(STATISTICS)}, *points, rows), **new)")
        lines += self._launched("gradient_statistics", self.rows)
        lines += self._by_rows()
        if "gradient_keys" in self.kernels:
            lines += [f"sum{n} = gradient{n}" for n in self.keys.loads]
            lines += self._listed(self.keys, "keys")
            lines += self._launched("gradient_keys", self.keys)
        return lines

    def _by_rows(self) -> list[str]:
        side, lines = self.rows, list[str]()
        if "gradient_rows" not in self.kernels:
            return lines
        after: list[str] = []
        apart = [n for n, x, _ in side.summed if x.over == "j - i"]
        for n, x, _ in side.summed:
            if x.over == "":
                lines.append(f"sum{n} = torch.empty((*points, rows), **new)")
                after.append(f"gradient{n}.copy_(sum{n}.sum(-1))")
            elif x.over != "j - i":
                lines.append(f"sum{n} = gradient{n}")
        count = self.show(count_of(side.held))
        if apart:
            c = side.p.config
            lines += [
                f"tiles = triton.cdiv(rows, {c.block_m})",
                f"programs = min(tiles, {SHARES})",
                f"share_start = tiles * {c.block_m} + {c.block_n}",
                f"share_length = share_start + (triton.cdiv(keys, {c.block_n}) + 1) * {c.block_n}",
            ]
        for n in apart:
            lines.append(f"share{n} = torch.zeros(({count}, programs, share_length), **new)")
            own = f"share{n}.sum(1)[:, share_start + 1 - rows : share_start + keys]"
            after.append(f"gradient{n}.copy_({own}.reshape(gradient{n}.shape))")
        lines += self._listed(side, "rows")
        grid = f"programs, {count}" if apart else ""
        return [*lines, *self._launched("gradient_rows", side, grid), *after]

    def _listed(self, side: Side, name: str) -> list[str]:
        """The lists of this call, for each batch point that the mask mentions and each tile."""
        p = side.p
        if not p.listed:
            return []
        c = p.config
        look = self.kernels[f"look_{name}"]
        looking = [*arguments(look, self.names, self.sizes), f"num_warps={c.warps}"]
        lists = f"triton.cdiv({self.show(p.row_count)}, {c.block_m}) * {self.show(count_of(p.list_points))}"
        packing = f"flags_{name}, blocks_{name}, counts_{name}, block_count_{name}"
        return [
            f"lists = {lists}",
            f"block_count_{name} = triton.cdiv({self.show(p.a.j.extent)}, {c.block_n})",
            f"flags_{name} = torch.empty((lists, block_count_{name}), dtype=torch.uint8, device=delta.device)",
            f"blocks_{name} = torch.empty((lists, block_count_{name}), dtype=torch.int32, device=delta.device)",
            f"counts_{name} = torch.empty((lists, 2), dtype=torch.int32, device=delta.device)",
            f"look_{name}[(lists, triton.cdiv(block_count_{name}, {LOOKS}))](",
            *wrapped(looking, "    "),
            ")",
            f"pack[(lists,)]({packing}, num_warps=4)",
        ]

    def _launched(self, name: str, side: Side, grid: str = "") -> list[str]:
        c = side.p.config
        if not grid:
            count = side.p.points if name == "gradient_statistics" else side.held
            grid = f"triton.cdiv({self.show(side.p.row_count)}, {c.block_m}) * {self.show(count_of(count))},"
        options = f"num_warps={c.warps}, num_stages={c.stages}, enable_fp_fusion=True"
        own = wrapped([*arguments(self.kernels[name], self.names, self.sizes), options], "    ")
        return [f"{name}[({grid})](", *own, ")"]
