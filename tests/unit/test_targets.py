"""What `module:factory` and .pt2 files load to, and the one line each bad one gives."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attncc.frontends.small import _with_layers, random_model
from attncc.frontends.targets import TargetError, load

MODULE = """
import torch

model = torch.nn.Linear(2, 3)
x = torch.zeros(1, 2)

def pair(): return model, (x,)
def lone_tensor(): return model, x
def keywords(): return model, {"input": x}
def triple(): return model, (), {"input": x}

class Own(torch.nn.Linear):
    example_inputs = (torch.zeros(1, 2),)

class Method(torch.nn.Linear):
    def example_inputs(self): return {"input": torch.zeros(1, 2)}

class Broken(torch.nn.Linear):
    def example_inputs(self): raise ValueError("no inputs\\ntoday")

def own(): return Own(2, 3)
own_instance = Own(2, 3)
def method(): return Method(2, 3)
def broken_inputs(): return Broken(2, 3)
def no_inputs(): return model
def nothing(): return None
def not_a_model(): return 3, (x,)
def raises(): raise RuntimeError("first line\\nsecond line")
def exits(): raise SystemExit(3)
def neighbour():
    import attncc_test_neighbour
    return attncc_test_neighbour.made()
class Space:
    @staticmethod
    def pair(): return model, (x,)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "attncc_test_target.py").write_text(MODULE)
    (tmp_path / "attncc_test_neighbour.py").write_text("import attncc_test_target\nmade = attncc_test_target.pair\n")
    (tmp_path / "attncc_test_raises.py").write_text("raise KeyError('at import')\n")
    (tmp_path / "attncc_test_needs.py").write_text("import attncc_test_absent\n")
    (tmp_path / "attncc_test_exits.py").write_text("raise SystemExit('usage: ...')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("attncc_test_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "name",
    [
        "pair", "lone_tensor", "keywords", "triple", "own", "own_instance", "method", "Space.pair", "neighbour",
    ],
)  # fmt: skip
def test_factories(here: Path, name: str) -> None:
    target = load(f"attncc_test_target:{name}")
    assert target.model(*target.args, **target.kwargs).shape == (1, 3)
    assert not target.exported


def test_exported_program(here: Path) -> None:
    program = torch.export.export(torch.nn.Linear(2, 3), (torch.zeros(1, 2),))
    torch.export.save(program, here / "linear.pt2")
    target = load("linear.pt2")
    assert target.exported
    assert target.model.module()(torch.zeros(1, 2)).shape == (1, 3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nosuch_module_of_anyone:thing", "no module named 'nosuch_module_of_anyone'"),
        ("nosuch_module_of_anyone.sub:thing", "no module named 'nosuch_module_of_anyone'"),
        ("attncc_test_target.sub:thing", "no module named 'attncc_test_target.sub'"),
        ("attncc_test_target:absent", "has no 'absent'"),
        ("attncc_test_target:Space.absent", "has no 'Space.absent'"),
        ("attncc_test_target:raises", "the factory raised RuntimeError: first line"),
        ("attncc_test_target:exits", "the factory raised SystemExit: 3"),
        ("attncc_test_target:nothing", "gives None"),
        ("attncc_test_target:no_inputs", "a value of type Linear"),
        ("attncc_test_target:broken_inputs", "example_inputs() raised ValueError: no inputs"),
        ("attncc_test_target:not_a_model", "which cannot be called"),
        ("attncc_test_raises:thing", "importing attncc_test_raises raised KeyError: 'at import'"),
        ("attncc_test_needs:thing", "raised ModuleNotFoundError: No module named 'attncc_test_absent'"),
        ("attncc_test_exits:thing", "raised SystemExit: usage: ..."),
        ("no_colon", "a target is `module:factory`, `path/file.py:factory`"),
        (":thing", "a target is `module:factory`, `path/file.py:factory`"),
        ("module:", "a target is `module:factory`, `path/file.py:factory`"),
        (".:x", "importing . raised"),
        ("absent.pt2", "no such file"),
        ("", "a target is `module:factory`, `path/file.py:factory`"),
    ],
)
def test_bad_targets(here: Path, text: str, says: str) -> None:
    with pytest.raises(TargetError) as error:
        load(text)
    message = str(error.value)
    assert message.startswith(f"{text}: ")
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
def test_truncated_program(here: Path, keep: float) -> None:
    program = torch.export.export(torch.nn.Linear(2, 3), (torch.zeros(1, 2),))
    torch.export.save(program, here / "whole.pt2")
    whole = (here / "whole.pt2").read_bytes()
    (here / "cut.pt2").write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    with pytest.raises(TargetError, match=r"^cut\.pt2: not a whole \.pt2 archive") as error:
        load("cut.pt2")
    assert "\n" not in str(error.value)


def test_a_file_is_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds its neighbours, as a script does, wherever it is called from."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "neighbour_of_a_target.py").write_text("x = 3\n")
    file = tmp_path / "target_in_a_file.py"
    file.write_text(
        "import torch\nfrom neighbour_of_a_target import x\n"
        "def made(): return torch.nn.Linear(x, 2), (torch.zeros(1, x),)\n"
    )
    target = load(f"{file}:made")
    assert target.model.in_features == 3 and target.args[0].shape == (1, 3)
    with pytest.raises(TargetError, match=r"target_in_a_file.py has no 'other'"):
        load(f"{file}:other")
    with pytest.raises(TargetError, match=r"name a factory in it, .*target_in_a_file.py:FACTORY"):
        load(str(file))
    with pytest.raises(TargetError, match=r"there is no file none\.py"):
        load("none.py:made")
    file.write_text("raise ValueError('no')\n")
    with pytest.raises(TargetError, match=r"running .*target_in_a_file.py raised ValueError: no"):
        load(f"{file}:made")


@pytest.mark.slow
def test_a_type_of_transformers_is_made_with_as_many_layers_as_asked_for() -> None:
    pytest.importorskip("transformers")
    model, inputs = random_model("bert", 1, 16)
    assert len(model.encoder.layer) == 1 and model.config.hidden_size == 768
    assert inputs["input_ids"].shape == (2, 16)
    with pytest.raises(TargetError, match=r"hf:brt: .* did you mean bert"):
        random_model("brt", 1, 16)
    with pytest.raises(TargetError, match=r"hf:llama: .* billion parameters with 100 layers"):
        random_model("llama", 100, 16)
    with pytest.raises(TargetError, match=r"hf: needs a type"):
        random_model("", 1, 16)


def test_kinds_of_layers_that_are_made_from_their_number_are_not_set() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config()
    _with_layers(config, 3)
    assert config.num_hidden_layers == 3 and len(config.layer_types) == 3
