"""Files as torch's two exporters write them."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.support.exports.models import Model


def export(model: Model, path: Path, *, new: bool, opset: int, dynamic: bool, half: bool = False) -> None:
    """Write a model as ONNX: by `torch.export` or by tracing, for the sizes of its arguments or with dimensions open,
    in float16 where asked for."""
    module, args = model.module, model.args
    if half:
        module = module.half()
        args = tuple(x.half() if x.is_floating_point() else x for x in args)
    names = [f"x{n}" for n in range(len(args))]
    how: dict[str, Any] = {"opset_version": opset, "input_names": names}
    if new and dynamic:
        dims = {name: torch.export.Dim.DYNAMIC for axes in model.open_axes for name in axes.values()}
        shapes = tuple({at: dims[n] for at, n in axes.items()} for axes in model.open_axes)
        how["dynamic_shapes"] = _nested(module, shapes)
    elif dynamic:
        how["dynamic_axes"] = dict(zip(names, model.open_axes, strict=True))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, args, str(path), dynamo=new, verbose=False, **how)


def _nested(module: torch.nn.Module, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Shapes of arguments as the signature of `forward` has them, what follows `*` in a tuple of its own."""
    code = module.forward.__func__.__code__  # type: ignore[union-attr]
    plain = code.co_argcount - 1
    return (*shapes[:plain], shapes[plain:]) if code.co_flags & 4 else shapes
