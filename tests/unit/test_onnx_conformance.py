"""The op table against the backend tests of the `onnx` package: right, or refused in one line, and never wrong."""

import warnings
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")

import onnx_ir as ir  # noqa: E402
import torch  # noqa: E402
from onnx import numpy_helper  # noqa: E402
from onnx.backend.test.loader import load_model_tests  # noqa: E402

from attncc.frontends.onnx.running import CONTROL, ROWS, OnnxModule  # noqa: E402
from attncc.frontends.onnx.values import Unsupported  # noqa: E402
from attncc.frontends.targets import TargetError  # noqa: E402

#: Element types that torch has no arithmetic for, or that numpy has not.
_OTHER_TYPES = ("uint16", "uint32", "uint64", "string", "bfloat16", "bf16", "float8", "int4", "int2", "float4", "f8",
                "FLOAT8", "INT4", "INT2", "FLOAT4", "BFLOAT16", "STRING", "e8m0")  # fmt: skip


@cache
def cases() -> dict[str, list[Any]]:
    """The cases of one node that the table has a row for, by operator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        every = load_model_tests(kind="node")
    found: dict[str, list[Any]] = {}
    for t in every:
        node = t.model.graph.node[0]
        known = not node.domain and node.op_type in (*ROWS, *CONTROL)
        plain = len(t.model.graph.node) == 1 and known
        # what numpy has no element type for stands there as strings, or as protobuf
        given = [x for inputs, _ in t.data_sets or () for x in inputs]
        held = plain and all(getattr(x, "dtype", None) not in (None, np.dtype(object)) for x in given)
        if held and not any(x in t.name for x in (*_OTHER_TYPES, "_seq", "_opt")):
            found.setdefault(node.op_type, []).append(t)
    return found


def fixed(model: Any, inputs: list[Any]) -> tuple[Any, list[np.ndarray]]:
    """A model whose sizes and axes are data of the file, as exporters write them, and the inputs that are left."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    pairs = list(zip(made.graph.input, inputs, strict=False))
    held = [
        v.name for v, x in pairs
        if len(pairs) > 1 and isinstance(x, np.ndarray) and
        ((x.dtype in (np.int64, np.int32, np.bool_) and x.ndim <= 1 and x.size <= 16) or v.name in ("scales", "roi"))
    ]  # fmt: skip
    made.graph.initializer.extend(numpy_helper.from_array(x, v.name) for v, x in pairs if v.name in held)
    left = [v for v, _ in pairs if v.name not in held]
    rest = [np.asarray(x) for v, x in pairs if v.name not in held]
    del made.graph.input[:]
    made.graph.input.extend(left)
    return made, rest


def outcome(t: Any) -> str:
    """`right`, or why the case is refused."""
    for inputs, wanted in t.data_sets:
        model, given = fixed(t.model, list(inputs))
        try:
            found = OnnxModule(ir.from_proto(model))(*(torch.from_numpy(np.array(x)) for x in given))
        except (TargetError, Unsupported) as error:
            assert "\n" not in str(error), t.name
            return str(error)
        assert len(found) == len(wanted), t.name
        for x, y in zip(wanted, found, strict=True):
            x, y = np.asarray(x), y.numpy()
            assert (y.dtype, y.shape) == (x.dtype, x.shape), t.name
            loose = 2e-3 if x.dtype == np.float16 else 1e-5
            # the package's own tolerance: some of its results are decimals of four digits
            np.testing.assert_allclose(y, x, rtol=max(t.rtol, loose), atol=loose, err_msg=t.name)
    return "right"


@pytest.mark.parametrize("op", ["Attention", "Gather", "If", "Loop", "Mod", "Scan", "TopK"])
def test_cases_of(op: str) -> None:
    outcomes = [outcome(t) for t in cases()[op]]
    assert outcomes.count("right") >= 0.6 * len(outcomes), outcomes


@pytest.mark.full
def test_every_case() -> None:
    counts = Counter[str]()
    for op, every in cases().items():
        for t in every:
            counts["right" if outcome(t) == "right" else op] += 1
    refused = sum(n for op, n in counts.items() if op != "right")
    print(counts)
    assert counts["right"] > 650 and refused < 0.16 * counts["right"], counts
