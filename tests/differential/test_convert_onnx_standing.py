"""`Attention` that stands in a file already: read in all its forms, kept, or improved."""

from pathlib import Path
from typing import Any

import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from onnx import helper  # noqa: E402

from attncc.convert.convert import Wish, convert  # noqa: E402

FLOAT, BOOL, INT = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL, onnx.TensorProto.INT64
HEADS, ROWS, KEYS, PAST, WIDTH = 4, 5, 7, 3, 8


def standing(
    opset: int, *, mask: int = 0, past: bool = False, outputs: int = 1, shared: int = HEADS, flat: bool = False,
    lengths: bool = False, **how: Any,
) -> Any:  # fmt: skip
    """One node. `mask` is its element type, none where 0; `flat`: heads side by side."""
    shapes = {"q": (HEADS, ROWS), "k": (shared, KEYS), "v": (shared, KEYS)}
    given = [
        (n, FLOAT, ["batch", rows, heads * WIDTH] if flat else ["batch", heads, rows, WIDTH])
        for n, (heads, rows) in shapes.items()
    ]  # fmt: skip
    how |= {"q_num_heads": HEADS, "kv_num_heads": shared} if flat else {}
    more: list[tuple[str, int, list[Any]] | None] = [
        ("mask", mask, ["batch", 1, ROWS, KEYS + PAST * past]) if mask else None,
        *((n, FLOAT, ["batch", shared, PAST, WIDTH]) if past else None for n in ("past_k", "past_v")),
        ("lengths", INT, ["batch"]) if lengths else None,
    ]
    every = [*given, *more]
    while every[-1] is None:
        every.pop()
    outs = ["y", *(n if past or n == "scores" else "" for n in ("all_k", "all_v", "scores"))][:outputs]
    node = helper.make_node("Attention", [x[0] if x else "" for x in every], outs, **how)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info(*x) for x in every if x],
        [helper.make_tensor_value_info(n, FLOAT, None) for n in outs if n],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


FORMS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (23, {}), "causal": (23, {"is_causal": 1}), "capped": (23, {"softcap": 1.5, "mask": FLOAT}),
    "masked": (24, {"mask": BOOL, "shared": 2}), "past": (23, {"past": True, "outputs": 3, "mask": FLOAT}),
    "scores": (23, {"outputs": 4, "past": True}), "weights": (25, {"outputs": 4, "qk_matmul_output_mode": 3}),
    "flat": (23, {"flat": True, "shared": 2, "is_causal": 1}), "lengths": (24, {"lengths": True}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_it_is_kept(form: str, tmp_path: Path) -> None:
    opset, how = FORMS[form]
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(standing(opset, **how), source)
    (site,) = convert(Wish(str(source), out, "onnx", measure=False)).report.sites
    assert (site.status, site.code) == ("kept", "onnx-attention") and site.equation
    assert onnx.load(out) == onnx.load(source)


@pytest.mark.parametrize(("form", "became"), [("plain", "MultiHeadAttention"), ("past", "Attention already")])
def test_it_is_improved_where_the_runtime_has_better(form: str, became: str, tmp_path: Path) -> None:
    opset, how = FORMS[form]
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(standing(opset, **how), source)
    done = convert(Wish(str(source), out, "onnx", measure=False, target="onnxruntime"))
    (site,) = done.report.sites
    assert became in (site.became, site.reason.rpartition("operator ")[2])
    assert done.checked.startswith("checked on 3") == (site.status == "fused")
