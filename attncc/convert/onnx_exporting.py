"""An exported program as an ONNX file, by torch's own exporter."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from attncc.frontends.targets import TargetError, one_line


def export(program: ExportedProgram, source: str, opset: int = 23) -> tuple[Path, Path]:
    """An exported program as an ONNX file in a folder of its own: (folder, file). Raises TargetError, which names the
    operator of torch that has no form in ONNX where there is one."""
    folder = Path(tempfile.mkdtemp(prefix="attncc-onnx-"))
    file = folder / "model.onnx"
    try:
        import onnxscript  # noqa: F401, PLC0415 what torch's exporter is written in

        table: dict[Any, Any] = {torch.ops.aten.sort.stable: _sort}
        torch.onnx.export(
            program, (), str(file), dynamo=True, opset_version=opset, verbose=False, custom_translation_table=table
        )
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        needs = "needs onnxscript; pip install 'attncc[onnx]'"
        why = needs if isinstance(error, ImportError) else f"cannot write it ({_cause(error)})"
        raise TargetError(f"{source}: torch's ONNX exporter {why}") from error
    return folder, file


def _cause(error: BaseException) -> str:
    """The operator that has no form in ONNX, or the first line of the error."""
    x: BaseException | None = error
    while x is not None:
        found = re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", str(x))
        if found:
            return f"{found[1]} has no form in ONNX"
        x = x.__cause__
    return one_line(error)


def _sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """`torch.sort`: all of the largest, or the least, of equal ones the first first, as the operator has it."""
    from onnxscript import opset18  # noqa: PLC0415 an extra

    op: Any = opset18
    count: Any = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]), axis=0)
    return op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)
