"""AOTInductor packages with attncc's kernels inside, which run in a process without attncc and without Python.

Each call of attncc's operator becomes an operator of its own, whose C function (`attncc.codegen.cpp.aoti`) and
kernels are linked into the package. What has no compiled kernel becomes operators of torch.
"""

from __future__ import annotations

import operator
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from attncc.codegen import cpp
from attncc.codegen.cpp.aoti import declaration, functions
from attncc.codegen.cpp.packed import Packed
from attncc.convert.packing import Compiling
from attncc.convert.portable import portable_form
from attncc.convert.tracing import traced_into
from attncc.environment import variable
from attncc.frontends.targets import TargetError, one_line
from attncc.ir import Attention, Bounds, parse_attention, print_attention
from attncc.kernels.build import optimise
from attncc.kernels.skip_tables import WORTHWHILE, work_of
from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.rewrites.forward_only import forward_only
from attncc.passes.tables.spans import Spanned, reads_by_key, spanned, tables
from attncc.patterns.graph.operators import hint
from attncc.progress import step
from attncc.runtime.outputs import signature_of

#: What everything but the kernels is compiled for where the user says for which instruction sets these are.
_ANY_X86 = {"cpp.march": "x86-64-v3", "cpp.simdlen": 256}
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)


@dataclass(frozen=True)
class _Kernel:
    packed: Packed
    bounds: Bounds
    operator: Any


class Packing:
    """The kernels of a package. `form` makes the calls of a program those of its functions; `write` then makes the
    package. Both raise TargetError where that is impossible here."""

    def __init__(self, isas: Sequence[str] = ()) -> None:
        """`isas`: instruction sets, one of which is chosen where the package is loaded; this machine's alone if none
        is named."""
        self.compiling, self.chosen = Compiling.of(isas), bool(isas)
        self._kernels: dict[str, _Kernel] = {}
        self._library = torch.library.Library("attncc_packed", "FRAGMENT")

    def form(self, graph: fx.Graph, call: fx.Node) -> Sequence[fx.Node]:
        tensors, sizes, spec = call.args
        assert isinstance(spec, str) and isinstance(tensors, Sequence) and isinstance(sizes, Sequence)
        a = optimise(forward_only(parse_attention(spec)))
        found = _spanned(a, sizes)
        name = f"attncc_{sha256(f'{spec}{print_attention(found.attention)}'.encode()).hexdigest()[:16]}"
        packed = Packed(name, found.attention, self.compiling.isas)
        if cpp.unsupported(a) is not None or not packed.fits:
            return portable_form(graph, call)
        if name not in self._kernels:
            self._kernels[name] = _Kernel(packed, found.bounds, self._operator(packed, spec, len(a.tensors)))
        more = _tables(graph, found, len(a.tensors), tensors, sizes)
        made = graph.call_function(self._kernels[name].operator, (*tensors, *more, *sizes))
        given = call.meta["val"]
        if len(a.outputs) == 1:
            made.meta["val"] = given[0]
            return [made]
        made.meta["val"] = tuple(given)
        parts = [graph.call_function(operator.getitem, (made, n)) for n in range(len(a.outputs))]
        for part, value in zip(parts, given, strict=True):
            part.meta["val"] = value
        return parts

    def _operator(self, p: Packed, spec: str, own: int) -> Any:
        """The operator of an attention: its tensors and its sizes one by one, since the C function takes them so. The
        first `own` of the tensors are those of `spec`."""
        count, single = len(p.attention.tensors), len(p.attention.outputs) == 1
        takes = [*(f"Tensor t{n}" for n in range(count)), *(f"SymInt n{n}" for n in range(len(p.attention.sizes)))]
        gives = ", ".join(["Tensor"] * len(p.attention.outputs))
        self._library.define(f"{p.name}({', '.join(takes)}) -> {gives if single else f'({gives})'}", tags=_TAGS)

        def run(*given: Any) -> Any:
            found = torch.ops.attncc.attention(list(given[:own]), list(given[count:]), spec)
            return found[0] if single else tuple(found)

        def fake(*given: Any) -> Any:
            found = signature_of(spec).allocate(given[:own], given[count:])
            return found[0] if single else tuple(found)

        self._library.impl(p.name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"attncc_packed::{p.name}", fake, lib=self._library)
        return getattr(torch.ops.attncc_packed, p.name).default

    def write(self, program: ExportedProgram, path: Path, name: str) -> Callable[..., Any]:
        """The package of a program whose calls `form` made, into a file; that package, loaded."""
        with tempfile.TemporaryDirectory(prefix="attncc-packed-") as folder:
            options: dict[str, Any] = dict(_ANY_X86) if self.chosen and "neon" not in self.compiling.isas else {}
            if self._kernels:
                kernels = {x.packed: x.bounds for x in self._kernels.values()}
                objects = self.compiling.objects(Path(folder), functions(list(kernels)), kernels)
                self.compiling.archive(objects, Path(folder) / "libattncc_packed.a")
                options |= {
                    "aot_inductor.custom_ops_to_c_shims": {
                        x.operator: [declaration(x.packed)] for x in self._kernels.values()
                    },
                    "aot_inductor.custom_op_libs": ["attncc_packed"],
                }
            step(f"writing {path.name}")
            try:
                with variable("LIBRARY_PATH", os.pathsep.join(filter(None, (folder, os.environ.get("LIBRARY_PATH"))))):
                    torch._inductor.aoti_compile_and_package(
                        program, package_path=str(path), inductor_configs=options
                    )
                return torch._inductor.aoti_load_package(str(path))
            except Exception as error:
                raise TargetError(f"{name}: AOTInductor cannot compile this program ({one_line(error)})") from error


def _spanned(a: Attention, sizes: Sequence[Any]) -> Spanned:
    """The attention as its kernel takes it: where its mask reads data by key, and it is large enough on the example
    inputs for that to pay, with tables of what that data shows. Maps of blocks are cut by their sizes: none of open
    ones."""
    known = [hint(x.meta["val"] if isinstance(x, fx.Node) else x) or 0 for x in sizes]
    found = spanned(a, by_looking="none") if reads_by_key(a) and work_of(a, known) >= WORTHWHILE else None
    if found is None or not (found.spans or found.maps) or (found.maps and any(isinstance(x, fx.Node) for x in sizes)):
        return Spanned(a, loop_bounds(a, rows=True))
    return found


def _tables(
    graph: fx.Graph, found: Spanned, own: int, tensors: Sequence[Any], sizes: Sequence[Any]
) -> Sequence[fx.Node]:
    """The nodes of the tables that a kernel takes beside the tensors of its attention."""
    names = [t.name for t in found.attention.tensors]
    if len(names) == own:
        return []

    def run(*given: Any) -> list[torch.Tensor]:
        made = tables(found, dict(zip(names, given[:own], strict=False)), given[own:])
        return [made[name] for name in names[own:]]

    return traced_into(graph, run, [*tensors, *sizes])
