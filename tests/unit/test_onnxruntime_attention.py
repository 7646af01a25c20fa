"""What onnxruntime's own kernel for `Attention` computes: the table that the emitted form relies on."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import helper  # noqa: E402

B, H, N, M, D = 2, 4, 5, 7, 8


def run(
    *, heads: int = H, rows: int = N, e: int = D, mask: Any = None, dtype: Any = np.float32, opset: int = 23, **how: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(what onnxruntime gives, the equation in float64)."""
    random = np.random.default_rng(0)
    shapes = (B, H, rows, D), (B, heads, M, D), (B, heads, M, e)
    feed = {n: random.standard_normal(s).astype(dtype) for n, s in zip("qkv", shapes, strict=True)}
    if mask is not None:
        feed["m"] = mask
    given = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for n, x in feed.items()]
    out = helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), None)
    graph = helper.make_graph([helper.make_node("Attention", list(feed), ["y"], **how)], "g", given, [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    q, k, v = (feed[n].astype(np.float64) for n in "qkv")
    k, v = (np.repeat(x, H // heads, 1) for x in (k, v))
    s = q @ k.swapaxes(-1, -2) * how.get("scale", D**-0.5)
    cap = how.get("softcap", 0.0)
    s = cap * np.tanh(s / cap) if cap else s
    if mask is not None:
        s = np.where(mask, s, -np.inf) if mask.dtype == bool else s + mask
    if how.get("is_causal"):
        s = np.where(np.tril(np.ones((rows, M), bool)), s, -np.inf)
    w = np.exp(s - s.max(-1, keepdims=True))
    return session.run(None, feed)[0], w / w.sum(-1, keepdims=True) @ v


def seen(*shape: int) -> np.ndarray:
    found = np.random.default_rng(1).random(shape) < 0.6
    found[..., 0] = True
    return found


def bias(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {}, "scaled": {"scale": 0.3}, "grouped": {"heads": 2}, "one-head": {"heads": 1}, "wide-values": {"e": 12},
    "causal": {"is_causal": 1, "rows": M}, "causal-fewer-rows": {"is_causal": 1}, "capped": {"softcap": 1.5},
    "capped-causal": {"softcap": 1.5, "is_causal": 1}, "capped-bias": {"softcap": 1.5, "mask": bias(1, 1, N, M)},
    "mask": {"mask": seen(B, H, N, M)}, "mask-batch": {"mask": seen(B, 1, N, M)},
    "mask-heads": {"mask": seen(1, H, N, M)},
    "mask-alone": {"mask": seen(1, 1, N, M)}, "bias": {"mask": bias(B, H, N, M)},
    "bias-heads": {"mask": bias(1, H, N, M)},
    "grouped-mask": {"heads": 2, "mask": seen(B, 1, N, M)},
}  # fmt: skip


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_computed(form: str, opset: int) -> None:
    found, wanted = run(opset=opset, **FORMS[form])
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_half_precision() -> None:
    found, wanted = run(dtype=np.float16)
    np.testing.assert_allclose(found, wanted, atol=2e-3)


def test_a_mask_without_rows_is_not_taken() -> None:
    """That is why the row axis is always written out."""
    with pytest.raises(Exception, match="q_sequence_length"):
        run(mask=seen(B, 1, 1, M))


@pytest.mark.parametrize(("fill", "gives"), [(False, "zero"), (-np.inf, "zero"), (-1e30, "mean")])
def test_rows_that_see_nothing(fill: Any, gives: str) -> None:
    mask = np.ones((1, 1, N, M), bool) if fill is False else np.zeros((1, 1, N, M), np.float32)
    mask[:, :, 2] = fill
    with np.errstate(invalid="ignore"):
        found, _ = run(mask=mask)
    values = np.random.default_rng(0)
    _, _, v = (values.standard_normal(s).astype(np.float32) for s in ((B, H, N, D), (B, H, M, D), (B, H, M, D)))
    np.testing.assert_allclose(found[:, :, 2], 0 if gives == "zero" else v.mean(-2), atol=1e-6)
