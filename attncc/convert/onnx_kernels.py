"""attncc's kernels for onnxruntime: a library of operators beside a model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from attncc.codegen import cpp
from attncc.codegen.cpp.onnxruntime import DOMAIN, library
from attncc.codegen.cpp.packed import Packed
from attncc.codegen.onnx import Value
from attncc.codegen.onnx.nodes import Extent
from attncc.convert.packing import Compiling
from attncc.ir import Attention, Size, print_attention
from attncc.ir.evaluate import DTYPE_OF
from attncc.passes.bounds.bounds import loop_bounds


class KernelLibrary:
    """The operators that a model calls. Raises TargetError where no kernel can be compiled here."""

    def __init__(self, isas: Sequence[str] = ()) -> None:
        """`isas`: instruction sets, one of which is chosen where the library is loaded; this machine's if none is."""
        self._compiling = Compiling.of(isas)
        self._kernels: dict[str, Packed] = {}

    @property
    def called(self) -> bool:
        return bool(self._kernels)

    def has(self, a: Attention) -> bool:
        """Whether there is an operator for an attention."""
        return a.outputs == ("out",) and cpp.unsupported(a) is None and self._packed(a).fits

    def call(self, a: Attention, tensors: Sequence[Value], sizes: Mapping[Size, Extent]) -> Value:
        """(*batch, rows, e): the output of `a`, whose tensors and sizes are given."""
        p = self._packed(a)
        self._kernels[p.name] = p
        nodes = tensors[0].nodes
        given = nodes.whole([sizes[x] for x in a.sizes]) if a.sizes else nodes.constant([0])
        shape = [sizes[x.extent] if isinstance(x.extent, Size) else int(x.extent.value) for x in a.out_axes]
        return nodes.call(p.name, [*tensors, given], DTYPE_OF[a.dtype], shape, domain=DOMAIN)

    def write(self, path: Path) -> None:
        """The library, into a file."""
        kernels = {p: loop_bounds(p.attention, rows=True) for p in self._kernels.values()}
        with tempfile.TemporaryDirectory(prefix="attncc-packed-") as folder:
            self._compiling.shared(self._compiling.objects(Path(folder), library(list(kernels)), kernels), path)

    def _packed(self, a: Attention) -> Packed:
        name = f"Attention_{sha256(print_attention(a).encode()).hexdigest()[:16]}"
        return Packed(name, a, self._compiling.isas)
