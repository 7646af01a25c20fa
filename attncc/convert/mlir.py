"""MLIR out, by torch-mlir: a portable program, in its torch dialect, where attentions stay one operation each, or in
linalg."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram, default_decompositions
from torch.utils._pytree import tree_leaves

from attncc.frontends.targets import TargetError, one_line
from attncc.progress import step

SDPA = torch.ops.aten.scaled_dot_product_attention.default


#: What torch-mlir calls a dialect, and what IREE calls it as input.
DIALECTS = {"torch": ("torch", "torch"), "linalg": ("linalg-on-tensors", "auto")}


def write(
    program: ExportedProgram, path: Path, source: str, *, decompose: bool, dialect: str = "torch"
) -> Callable[..., Any] | None:  # fmt: skip
    """Write a program of operators of torch; what IREE makes of the file, as a function, None where IREE is not
    installed. With `decompose` attentions are written as products and a softmax. Raises TargetError."""
    try:
        fx: Any = import_module("torch_mlir.fx")
        known: Any = import_module("torch_mlir.extras.fx_decomp_util")
    except ImportError as error:
        raise TargetError(f"{source}: writing MLIR needs torch-mlir; pip install 'attncc[mlir]'") from error
    table: Any = default_decompositions()
    for op, how in known.get_decomposition_table().items():
        table[op] = how
    if not decompose:
        table.pop(SDPA, None)
    try:
        lowered = program.run_decompositions(table)
        _persist(lowered)
        wanted, read_as = DIALECTS[dialect]
        module: Any = fx.export_and_import(lowered, output_type=wanted, func_name="main", decomposition_table={})
        if not module.operation.verify():
            raise ValueError("it does not verify")
        text = str(module)
    except Exception as error:
        raise TargetError(f"{source}: torch-mlir cannot write this program ({one_line(error)})") from error
    path.write_text(text, encoding="utf-8")
    return _compiled(path, source, read_as)


def _persist(program: ExportedProgram) -> None:
    """Let buffers that are not saved with a model be saved: torch-mlir's importer looks for all in the state."""
    for spec in program.graph_signature.input_specs:
        if spec.persistent is False and spec.target is not None:
            spec.persistent = True
            program.state_dict[spec.target] = program.constants[spec.target]


def _compiled(path: Path, source: str, kind: str) -> Callable[..., Any] | None:
    try:
        compiler: Any = import_module("iree.compiler")
        runtime: Any = import_module("iree.runtime")
    except ImportError:
        return None
    step("compiling with IREE")
    try:
        data = compiler.compile_file(
            str(path), target_backends=["llvm-cpu"], input_type=kind, extra_args=["--iree-llvmcpu-target-cpu=host"]
        )
        context = runtime.SystemContext(config=runtime.Config("local-task"))
        context.add_vm_module(runtime.VmModule.copy_buffer(context.instance, data))
    except Exception as error:
        raise TargetError(f"{source}: IREE does not compile what was written ({one_line(error)})") from error

    def run(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        given = [x.numpy() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        found = context.modules.module["main"](*given)
        every = found if isinstance(found, tuple | list) else (found,)
        return tuple(torch.from_numpy(x.to_host().copy()) for x in every)

    return run
