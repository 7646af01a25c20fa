"""Each row of the op table against onnxruntime: one node, run by both."""

from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

import onnx_ir as ir  # noqa: E402
import torch  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402

from attncc.frontends.onnx.running import ROWS, OnnxModule  # noqa: E402

random = np.random.default_rng(0)


def f(*shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def p(*shape: int) -> np.ndarray:
    return (random.random(shape) + 0.5).astype(np.float32)


def i(*values: Any) -> np.ndarray:
    return np.array(values if len(values) != 1 else values[0], dtype=np.int64)


def b(*shape: int) -> np.ndarray:
    return random.random(shape) < 0.5


#: (operator, its inputs, which of them are constants of the file, attributes, the opset, its number of outputs)
Case = tuple[str, list[Any], tuple[int, ...], dict[str, Any], int, int]


def case(
    op: str, *inputs: Any, constant: tuple[int, ...] = (), opset: int = 18, outputs: int = 1, **how: Any
) -> Case:
    return op, list(inputs), constant, how, opset, outputs


UNARY = ["Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "HardSwish", "Identity", "IsNaN", "Neg", "Reciprocal", "Relu",
         "Round", "Sigmoid", "Sign", "Sin", "Softplus", "Tanh", "Atan", "Softsign", "Mish", "Tan"]  # fmt: skip
ARITHMETIC = ["Add", "Sub", "Mul", "Div", "Max", "Min", "Sum"]
COMPARISONS = ["Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"]
CASES: list[Case] = [
    *(case(op, f(2, 3)) for op in UNARY),
    *(case(op, p(2, 3)) for op in ("Sqrt", "Log", "Acos") if op != "Acos"),
    case("Acos", f(3) % 1), case("Asin", f(3) % 1),
    *(case(op, f(2, 3), f(3)) for op in ARITHMETIC),
    *(case(op, i([[7, -7], [6, 5]]), i(2, -3)) for op in ("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min")),
    *(case(op, f(2, 3), np.float32(0.25), constant=(1,)) for op in ("Add", "Sub", "Mul", "Div")),
    *(case(op, np.float32(0.25), f(2, 3), constant=(0,)) for op in ("Add", "Sub", "Mul", "Div", "Less", "Greater")),
    *(case(op, i(1, 2, 3), i(3, 2, 1)) for op in COMPARISONS),
    *(case(op, b(2, 3), b(2, 3)) for op in ("And", "Or", "Xor")),
    case("Not", b(4)), case("Where", b(2, 3), f(2, 3), f(3)),
    case("Where", b(2, 3), np.float32(0), np.float32(-1e9), constant=(1, 2)),
    case("Pow", p(2, 3), np.float32(2), constant=(1,)), case("Mod", f(5), f(5), fmod=1),
    case("Cast", f(2, 3), to=7), case("Cast", i(0, 1, 2), to=9), case("Cast", f(3), to=10),
    case("CastLike", i(1, 2), f(1)), case("IsInf", np.array([1, np.inf, -np.inf], np.float32), detect_negative=0),
    case("Clip", f(4), np.float32(-0.5), np.float32(0.5), constant=(1, 2)), case("LeakyRelu", f(4), alpha=0.1),
    case("Elu", f(4), alpha=0.5), case("HardSigmoid", f(4)), case("PRelu", f(2, 3), p(3)),
    case("Gelu", f(4), opset=20), case("Gelu", f(4), approximate="tanh", opset=20),
    case("Concat", f(2, 3), f(1, 3), axis=0), case("Transpose", f(2, 3, 4), perm=[2, 0, 1]), case("Transpose", f(2, 3)),
    case("Reshape", f(2, 3, 4), i(0, -1), constant=(1,)), case("Flatten", f(2, 3, 4), axis=2),
    case("Squeeze", f(1, 3, 1), i([0]), constant=(1,)), case("Squeeze", f(1, 3, 1)),
    case("Squeeze", f(1, 3, 1), axes=[2], opset=11), case("Unsqueeze", f(3), i(0, 2), constant=(1,)),
    case("Unsqueeze", f(3), axes=[0], opset=11), case("Expand", f(3, 1), i(2, 1, 4), constant=(1,)),
    case("Tile", f(2, 3), i(2, 1), constant=(1,)), case("Shape", f(2, 3)), case("Shape", f(2, 3, 4), start=1, end=-1),
    case("Size", f(2, 3)), case("Gather", f(4, 3), i([[0, -1]])), case("Gather", f(4, 3), i(1, 2), axis=1),
    case("Gather", f(4, 3), i(1), constant=(1,)), case("GatherElements", f(2, 3), i([[0, 2], [1, 1]]), axis=1),
    case("GatherND", f(2, 3, 4), i([[0, 1], [1, 2]])),
    case("Slice", f(4, 6), i(1, 0), i(3, 99), i(0, 1), i(1, 2), constant=(1, 2, 3, 4)),
    case("Slice", f(4, 6), i([-1]), i([-99]), i([1]), i([-2]), constant=(1, 2, 3, 4)),
    case("Split", f(2, 6), axis=1, outputs=3, num_outputs=3), case("Split", f(6), i(2, 4), constant=(1,), outputs=2),
    case("Split", f(2, 6), axis=1, outputs=2, opset=11), case("Range", i(1), i(9), i(3), constant=(0, 1, 2)),
    case("ConstantOfShape", i(2, 3), constant=(0,), value=numpy_helper.from_array(np.array([4], np.int64))),
    case("Pad", f(2, 3), i(0, 1, 2, 0), constant=(1,)), case("Trilu", f(4, 4), upper=0),
    case("Trilu", f(4, 4), np.array(1), constant=(1,)), case("OneHot", i(0, 2), i(3), f(2), constant=(1,)),
    case("ScatterND", f(4, 2), i([[1], [3]]), f(2, 2)), case("ScatterElements", f(3, 2), i([[1, 0]]), f(1, 2)),
    case("DepthToSpace", f(1, 8, 2, 3), blocksize=2), case("DepthToSpace", f(1, 8, 2, 3), blocksize=2, mode="CRD"),
    case("EyeLike", f(3, 4)), case("CumSum", f(2, 3), i(1), constant=(1,)),
    case("CumSum", f(2, 3), i(1), constant=(1,), exclusive=1, reverse=1),
    *(case(op, f(2, 3, 4), i([-1]), constant=(1,)) for op in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin",
                                                              "ReduceProd", "ReduceL2", "ReduceLogSumExp",
                                                              "ReduceSumSquare")),
    case("ReduceMean", f(2, 3, 4), axes=[1, 2], keepdims=0, opset=13), case("ReduceSum", f(2, 3)),
    case("ArgMax", f(2, 5), axis=1), case("ArgMin", f(2, 5), axis=1, keepdims=0),
    case("TopK", f(2, 5), i([2]), constant=(1,), outputs=2), case("Softmax", f(2, 3, 4), axis=1),
    case("Softmax", f(2, 3, 4), axis=1, opset=11), case("Softmax", f(2, 3, 4), opset=11), case("LogSoftmax", f(2, 3)),
    case("MatMul", f(2, 3, 4), f(4, 5)), case("Gemm", f(2, 3), f(4, 3), f(4), transB=1),
    case("Gemm", f(3, 2), f(3, 4), f(2, 4), transA=1, alpha=0.5, beta=2.0),
    case("Einsum", f(2, 3), f(3, 4), equation="ij,jk->ki"),
    case("LayerNormalization", f(2, 3, 4), p(4), f(4)), case("RMSNormalization", f(2, 4), p(4), opset=23),
    case("GroupNormalization", f(2, 4, 3), p(4), f(4), num_groups=2, opset=21),
    case("InstanceNormalization", f(2, 3, 4), p(3), f(3)),
    case("BatchNormalization", f(2, 3, 4), p(3), f(3), f(3), p(3)),
    case("Conv", f(1, 4, 7, 7), f(6, 2, 3, 3), f(6), group=2, pads=[1, 0, 1, 2], strides=[2, 1]),
    case("Conv", f(1, 2, 7), f(3, 2, 3), auto_pad="SAME_LOWER", strides=[2]),
    case("ConvTranspose", f(1, 2, 4), f(2, 3, 3), strides=[2]),
    case("MaxPool", f(1, 2, 6, 6), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("AveragePool", f(1, 2, 6, 6), kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    case("GlobalAveragePool", f(1, 2, 3, 3)),
    case("Resize", f(1, 2, 3, 3), None, None, i(1, 2, 6, 6), constant=(3,), mode="linear"),
    case("Resize", f(1, 2, 3, 3), None, p(0), i(1, 2, 6, 6), constant=(2, 3),
         coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    case("Dropout", f(3)), case("Swish", f(3), opset=24),
    case("Attention", f(1, 2, 3, 4), f(1, 2, 5, 4), f(1, 2, 5, 4), is_causal=1, opset=23),
    case("Attention", f(1, 4, 3, 4), f(1, 2, 5, 4), f(1, 2, 5, 4), b(3, 5) | np.eye(3, 5, dtype=bool), scale=0.3,
         opset=23),
    case("RotaryEmbedding", f(1, 2, 3, 4), f(1, 3, 2), f(1, 3, 2), opset=23),
    case("RotaryEmbedding", f(1, 2, 3, 4), f(1, 3, 2), f(1, 3, 2), opset=23, interleaved=1),
    case("Constant", value=numpy_helper.from_array(f(2, 2))), case("Constant", value_ints=[1, 2]),
]  # fmt: skip


def model_of(c: Case) -> tuple[Any, dict[str, np.ndarray]]:
    op, inputs, constant, how, opset, outputs = c
    names = ["" if x is None else f"x{n}" for n, x in enumerate(inputs)]
    while names and not names[-1]:
        names.pop()
    data = [numpy_helper.from_array(np.asarray(inputs[n]), f"x{n}") for n in constant if names[n]]
    fed = {f"x{n}": np.asarray(x) for n, x in enumerate(inputs) if n not in constant and x is not None}
    given = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for n, x in fed.items()]
    made = [f"y{n}" for n in range(outputs)]
    node = helper.make_node(op, names, made, **how)
    graph = helper.make_graph([node], "g", given, [helper.make_empty_tensor_value_info(n) for n in made], data)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model), fed


@pytest.mark.parametrize("at", range(len(CASES)), ids=[f"{n}-{c[0]}" for n, c in enumerate(CASES)])
def test_row(at: int) -> None:
    model, fed = model_of(CASES[at])
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = session.run(None, fed)
    found = OnnxModule(ir.from_proto(model))(*(torch.from_numpy(x.copy()) for x in fed.values()))
    assert len(wanted) == len(found)
    for x, y in zip(wanted, found, strict=True):
        assert y.numpy().dtype == x.dtype
        np.testing.assert_allclose(y.numpy(), x, rtol=1e-4, atol=1e-5)


def test_every_row_has_a_case() -> None:
    assert set(ROWS) - {c[0] for c in CASES} == set()
