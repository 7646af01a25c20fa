"""Broken and hostile files: one line that says what is wrong, nothing run and nothing written."""

import json
import random
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")

import torch  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from attncc.cli.app import app  # noqa: E402
from attncc.convert.convert import Wish, convert  # noqa: E402
from attncc.frontends.onnx import running  # noqa: E402
from attncc.frontends.onnx.reading import read  # noqa: E402
from attncc.frontends.targets import TargetError, load  # noqa: E402

FLOAT = TensorProto.FLOAT


def good() -> Any:
    data = [numpy_helper.from_array(np.ones((4, 4), np.float32), "w")]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["q"]), helper.make_node("Transpose", ["q"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "t"], ["s"]), helper.make_node("Softmax", ["s"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "q"], ["y"]),
    ]  # fmt: skip
    values = [helper.make_tensor_value_info(n, FLOAT, ["b", 3, 4]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], data)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def cyclic(m: Any) -> None:
    m.graph.node[0].input[0] = "p"


def unmade(m: Any) -> None:
    m.graph.node[0].input[0] = "nowhere"


def twice(m: Any) -> None:
    m.graph.node[1].output[0] = "q"


def no_output(m: Any) -> None:
    m.graph.output[0].name = "missing"


def untyped(m: Any) -> None:
    m.graph.input[0].ClearField("type")


def future(m: Any) -> None:
    m.opset_import[0].version = 999


def ancient(m: Any) -> None:
    m.opset_import[0].version = 1


def no_opset(m: Any) -> None:
    del m.opset_import[:]


def custom(m: Any) -> None:
    m.graph.node[3].domain = "com.example"


def unknown(m: Any) -> None:
    m.graph.node[3].op_type = "Frobnicate"


def huge(m: Any) -> None:
    m.graph.initializer[0].dims[:] = [1 << 40, 1 << 20]


def negative(m: Any) -> None:
    m.graph.initializer[0].dims[:] = [-4, -4]


def short(m: Any) -> None:
    m.graph.initializer[0].raw_data = b"\0" * 8


def strange_type(m: Any) -> None:
    m.graph.initializer[0].data_type = 8


def outside(m: Any) -> None:
    onnx.external_data_helper.set_external_data(m.graph.initializer[0], "../../../../etc/passwd")
    m.graph.initializer[0].ClearField("raw_data")


def absolute(m: Any) -> None:
    onnx.external_data_helper.set_external_data(m.graph.initializer[0], "/etc/passwd")
    m.graph.initializer[0].ClearField("raw_data")


def absent(m: Any) -> None:
    onnx.external_data_helper.set_external_data(m.graph.initializer[0], "absent.bin")
    m.graph.initializer[0].ClearField("raw_data")


def beyond(m: Any) -> None:
    onnx.external_data_helper.set_external_data(m.graph.initializer[0], "model.onnx", offset=1 << 40)
    m.graph.initializer[0].ClearField("raw_data")


def recursive(m: Any) -> None:
    m.opset_import.append(helper.make_opsetid("own", 1))
    call = helper.make_node("F", ["a"], ["b"], domain="own")
    m.functions.append(helper.make_function("own", "F", ["a"], ["b"], [call], list(m.opset_import)))
    m.graph.node[3].domain, m.graph.node[3].op_type = "own", "F"
    del m.graph.node[3].attribute[:]


def exponential(m: Any) -> None:
    """Forty functions, each of which calls the next one twice."""
    m.opset_import.append(helper.make_opsetid("own", 1))
    for n in range(40):
        name = "Identity" if n == 39 else f"F{n + 1}"
        domain = "" if n == 39 else "own"
        calls = [helper.make_node(name, ["a"], ["c"], domain=domain),
            helper.make_node(name, ["c"], ["b"], domain=domain)]
        m.functions.append(helper.make_function("own", f"F{n}", ["a"], ["b"], calls, list(m.opset_import)))
    m.graph.node[3].domain, m.graph.node[3].op_type = "own", "F0"
    del m.graph.node[3].attribute[:]


def huge_input(m: Any) -> None:
    m.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1 << 40


def huge_tile(m: Any) -> None:
    m.graph.initializer.append(numpy_helper.from_array(np.array([1 << 40], np.int64), "n"))
    m.graph.node.insert(3, helper.make_node("Tile", ["n", "n"], ["many"]))
    m.graph.node.insert(4, helper.make_node("Reshape", ["s", "many"], ["s2"]))
    m.graph.node[5].input[0] = "s2"


def bad_axis(m: Any) -> None:
    m.graph.node[1].attribute[0].ints[:] = [0, 7, 1]


def no_such_axis(m: Any) -> None:
    m.graph.node[3].attribute[0].i = 9


def of_a_later_opset(m: Any) -> None:
    """As torch's new exporter writes Attention where it is asked for opset 26."""
    m.graph.node[3].op_type = "Gelu"


def outside_in_an_attribute(m: Any) -> None:
    data = numpy_helper.from_array(np.ones(1, np.float32), "v")
    onnx.external_data_helper.set_external_data(data, "../secret")
    data.ClearField("raw_data")
    m.graph.initializer.append(numpy_helper.from_array(np.array([3], np.int64), "n"))
    m.graph.node.insert(0, helper.make_node("ConstantOfShape", ["n"], ["v"], value=data))


def inside(m: Any, *nodes: Any, **how: Any) -> None:
    """Put a graph of these nodes in front of the softmax, as both branches of an `If`."""
    m.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))
    m.graph.input.append(helper.make_tensor_value_info("taken", TensorProto.BOOL, []))
    graph = helper.make_graph(list(nodes), "branch", [], [helper.make_tensor_value_info("s2", FLOAT, None)], **how)
    branches = {"then_branch": graph, "else_branch": graph}
    m.graph.node.insert(3, helper.make_node("If", ["taken"], ["s3"], **branches))
    m.graph.node[4].input[0] = "s3"


def cycle_inside(m: Any) -> None:
    inside(m, helper.make_node("Relu", ["s2"], ["t2"]), helper.make_node("Relu", ["t2"], ["s2"]))


def unmade_inside(m: Any) -> None:
    inside(m, helper.make_node("Relu", ["nowhere"], ["s2"]))


def unknown_inside(m: Any) -> None:
    inside(m, helper.make_node("Frobnicate", ["s"], ["s2"]))


def outside_inside(m: Any) -> None:
    data = numpy_helper.from_array(np.ones(1, np.float32), "d")
    onnx.external_data_helper.set_external_data(data, "/etc/hostname")
    data.ClearField("raw_data")
    inside(m, helper.make_node("Add", ["s", "d"], ["s2"]), initializer=[data])


def no_branch(m: Any) -> None:
    inside(m, helper.make_node("Relu", ["s"], ["s2"]))
    del m.graph.node[3].attribute[1:]


def exponential_inside(m: Any) -> None:
    """Forty functions, each of which calls the next one in both branches."""
    m.opset_import.append(helper.make_opsetid("own", 1))
    m.graph.input.append(helper.make_tensor_value_info("taken", TensorProto.BOOL, []))
    for n in range(40):
        call = helper.make_node("Identity", ["a"], ["o"]) if n == 39 else helper.make_node(
            f"F{n + 1}", ["a", "t"], ["o"], domain="own")  # fmt: skip
        graph = helper.make_graph([call], "branch", [], [helper.make_tensor_value_info("o", FLOAT, None)])
        node = helper.make_node("If", ["t"], ["b"], then_branch=graph, else_branch=graph)
        m.functions.append(helper.make_function("own", f"F{n}", ["a", "t"], ["b"], [node], list(m.opset_import)))
    m.graph.node[3].domain, m.graph.node[3].op_type = "own", "F0"
    m.graph.node[3].input.append("taken")
    del m.graph.node[3].attribute[:]


BAD: dict[Callable[[Any], None], str] = {
    cyclic: "cycle", unmade: "nothing makes", twice: "", no_output: "", untyped: "no type", future: "opset 999",
    ancient: "opset 1", no_opset: "opset 0", custom: "com.example", unknown: "Frobnicate", huge: "bytes", negative: "",
    short: "holds 8", strange_type: "", outside: "outside of its folder", absolute: "outside of its folder",
    absent: "no file", beyond: "does not hold", recursive: "calls itself", exponential: "functions make more",
    bad_axis: "Transpose", no_such_axis: "no axis 9",
    of_a_later_opset: "says opset 17, which has no Gelu",
    huge_input: "shape", huge_tile: "Tile", outside_in_an_attribute: "outside of its folder",
    cycle_inside: "cycle", unmade_inside: "nothing makes", unknown_inside: "Frobnicate",
    outside_inside: "outside of its folder", no_branch: "If", exponential_inside: "functions make more",
}  # fmt: skip


@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__)
def test_one_line(spoil: Callable[[Any], None], tmp_path: Path) -> None:
    model = good()
    spoil(model)
    source = tmp_path / "model.onnx"
    source.write_bytes(model.SerializeToString())
    start = time.monotonic()
    done = CliRunner().invoke(app, ["convert", str(source), "-o", str(tmp_path / "out.onnx"), "--no-check"])
    assert time.monotonic() - start < 30
    assert done.exit_code == 2, done.output
    said = done.stderr.strip()
    assert said.startswith("attncc: ") and "\n" not in said and str(source) in said and BAD[spoil] in said
    assert [x.name for x in tmp_path.iterdir()] == ["model.onnx"]


def field(number: int, data: bytes) -> bytes:
    """A field of a message as protobuf writes it."""
    length, n = bytearray(), len(data)
    while n > 127:
        length.append(n & 127 | 128)
        n >>= 7
    return bytes([number << 3 | 2, *length, n]) + data


def test_graphs_inside_of_graphs(tmp_path: Path) -> None:
    """Two thousand of them: more than is read."""
    graph = b""
    for _ in range(2000):
        graph = field(1, field(5, field(6, graph)))
    path = tmp_path / "model.onnx"
    path.write_bytes(field(7, graph))
    with pytest.raises(TargetError, match="not a whole ONNX model") as raised:
        read(path)
    assert "\n" not in str(raised.value)


def test_loops_inside_of_loops_are_not_written_out_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty turns of sixty turns of sixty turns of sixty."""
    node = helper.make_node("Relu", ["now"], ["next"])
    for depth in range(4):
        again = helper.make_node("Identity", ["more"], ["again"])
        inputs = [helper.make_tensor_value_info(n, t, []) for n, t in (("at", TensorProto.INT64), ("more",
            TensorProto.BOOL))]
        outputs = [helper.make_tensor_value_info("again", TensorProto.BOOL, []),
                   helper.make_tensor_value_info("next", FLOAT, None)]  # fmt: skip
        body = helper.make_graph([node, again], "body", [*inputs, helper.make_tensor_value_info("now", FLOAT, None)],
                                 outputs)  # fmt: skip
        node = helper.make_node("Loop", ["turns", "", "now" if depth < 3 else "s"], ["next" if depth < 3 else "s2"],
                                body=body)  # fmt: skip
    model = good()
    model.graph.initializer.append(numpy_helper.from_array(np.array(60), "turns"))
    model.graph.node.insert(3, node)
    model.graph.node[4].input[0] = "s2"
    source = tmp_path / "model.onnx"
    source.write_bytes(model.SerializeToString())
    monkeypatch.setattr(running, "MOST_MORE", 200)  # the real one takes half a minute
    with pytest.raises(TargetError, match="too many to be written out"):
        convert(Wish(str(source), tmp_path / "out.pt2", "pt2", portable=True))
    assert [x.name for x in tmp_path.iterdir()] == ["model.onnx"]


def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"\0" * 64)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "data").symlink_to(tmp_path / "secret")
    model = good()
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "data")
    model.graph.initializer[0].ClearField("raw_data")
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(TargetError, match="outside of its folder"):
        read(folder / "m.onnx")


def fuzz(count: int, seed: int, tmp_path: Path) -> None:
    """Files with bytes changed, cut off, doubled or put in: a model, or one line."""
    print(f"seed {seed}")
    chance, branched = random.Random(seed), good()
    inside(branched, helper.make_node("Add", ["s", "s"], ["t2"]), helper.make_node("Relu", ["t2"], ["s2"]))
    files = good().SerializeToString(), branched.SerializeToString()
    source, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    for n in range(count):
        data = bytearray(files[n % 2])
        for _ in range(chance.choice((1, 1, 2, 5, 20))):
            at = chance.randrange(len(data) or 1)
            match chance.randrange(5):
                case 0:
                    data[at : at + 1] = bytes([chance.randrange(256)])
                case 1:
                    del data[at:]
                case 2:
                    data[at:at] = data[: chance.randrange(64)]
                case 3:
                    data[at : at + 4] = struct.pack("<I", chance.choice((0, 1 << 31, 0xFFFFFFFF, 7)))
                case _:
                    del data[at : at + chance.randrange(1, 9)]
        source.write_bytes(data)
        start = time.monotonic()
        try:
            convert(Wish(str(source), out, "onnx", checked=False))
            out.unlink()
        except TargetError as error:
            assert "\n" not in str(error), (seed, n)
            assert not out.exists()
        assert time.monotonic() - start < 20, (seed, n)


def test_fuzzed_files(tmp_path: Path) -> None:
    fuzz(50, 0, tmp_path)


@pytest.mark.full
def test_many_fuzzed_files(tmp_path: Path) -> None:
    fuzz(2000, 1, tmp_path)


class Plain(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def archive(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """An exported program, its entries changed."""
    whole = path.with_suffix(".whole")
    shapes = ({0: torch.export.Dim("n", min=2, max=64)},)
    torch.export.save(torch.export.export(Plain(), (torch.ones(3),), dynamic_shapes=shapes), whole)
    with zipfile.ZipFile(whole) as given, zipfile.ZipFile(path, "w") as made:
        for entry in given.infolist():
            made.writestr(entry, change(entry.filename, given.read(entry)))
    whole.unlink()


def test_a_program_whose_sizes_are_code(tmp_path: Path) -> None:
    path, mark = tmp_path / "m.pt2", tmp_path / "ran"

    def change(name: str, data: bytes) -> bytes:
        found = json.loads(data) if name.endswith(".json") else None
        if not isinstance(found, dict) or "graph_module" not in found:
            return data
        text = json.dumps(found)
        assert '"expr_str": "' in text
        code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
        return text.replace('"expr_str": "', f'"expr_str": "{code} or ').encode()

    archive(path, change)
    with pytest.raises(TargetError, match="no arithmetic"):
        load(str(path))
    assert not mark.exists()


def test_a_program_of_pickles(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    archive(path, lambda name, data: data.replace(b"{", b'{"use_pickle": true, ', 1) if "config" in name else data)
    with pytest.raises(TargetError, match="pickled"):
        load(str(path))


@pytest.mark.parametrize("name", ["m.pt2", "m.onnx"])
@pytest.mark.parametrize("data", [b"", b"\x80\x04cos\nsystem\n", b"PK\x03\x04" + b"\0" * 50], ids=["empty",
    "pickle", "zip"])
def test_other_files(name: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(TargetError) as raised:
        convert(Wish(str(path), None, "pt2"))
    assert "\n" not in str(raised.value)
