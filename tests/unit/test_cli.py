"""The command line around the driver: what it prints, and how bad input ends. The driver itself is replaced here."""

import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import attncc
from attncc.bench import compile as compiling
from attncc.bench import context, cpu, cpu_rows, longcontext, windows
from attncc.cli.app import app
from attncc.frontends.targets import TargetError
from attncc.report.model import Report
from attncc.report.site import Site
from attncc.runtime.store import Store, key

pytestmark = pytest.mark.slow

SOURCE = "void attention(const float* q) {  // [b, h]\n}\n"
REPORT = Report(
    sites=(
        Site(
            index=0, status="fused", path="layers.0.attn", where="net.py:7", equation="softmax_j(s)", mask="i >= j",
            shapes={"q": (1, 2, 3, 4)}, became="C++ kernel", ir="attention(...)", kernel=SOURCE, language="cpp",
            picture="##",
        ),
        Site(index=1, status="refused", reason="softmax over an axis that is not contracted", path="router"),
    ),
    graph_before="def forward(before): ...", graph_after="def forward(after): ...",
)  # fmt: skip


def run(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


@pytest.fixture(autouse=True)
def explained(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What `explain` was called with."""
    calls: list[Any] = []

    def explain(model: Any, *args: Any, **kwargs: Any) -> Report:
        calls.append((model, args, kwargs))
        print("noise of the model")
        if isinstance(model, type(len)) or type(model).__name__ == "Raising":
            raise ValueError("bad shape\nmore")
        return REPORT

    monkeypatch.setattr(attncc, "explain", explain, raising=False)
    monkeypatch.setattr(attncc, "explain_program", lambda program: explain(program), raising=False)
    yield calls



@pytest.fixture(autouse=True)
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "attncc_cli_target.py").write_text(
        "import torch\n"
        "def factory(): return torch.nn.Identity(), (torch.zeros(1),), {'extra': 1}\n"
        "class Raising(torch.nn.Module):\n"
        "    def forward(self, x): raise ValueError('bad shape\\nof this model')\n"
        "def raising(): return Raising(), (torch.zeros(1),)\n"
        "def uncompiled(): return len, (torch.zeros(1),)\n"
    )


def test_inspect_prints_the_table(explained: list[Any]) -> None:
    result = run("inspect", "attncc_cli_target:factory")
    assert result.exit_code == 0, result.output
    assert "layers.0.attn" in result.stdout
    assert "2 sites: 1 fused, 0 kept, 1 refused" in result.stdout
    assert "noise" not in result.stdout
    ((_, args, kwargs),) = explained
    assert args[0].shape == (1,)
    assert kwargs == {"extra": 1}


def test_inspect_runs_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def explain(*_: Any, **__: Any) -> Report:
        seen.append(torch.is_grad_enabled())
        return REPORT

    monkeypatch.setattr(attncc, "explain", explain)
    assert run("inspect", "attncc_cli_target:factory").exit_code == 0
    assert seen == [False]


def test_inspect_shows_training_beside_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []

    def explain(_: Any, x: torch.Tensor, **__: Any) -> Report:
        seen.append((torch.is_grad_enabled(), x.requires_grad))
        return REPORT

    monkeypatch.setattr(attncc, "explain", explain)
    result = run("inspect", "attncc_cli_target:factory", "--train")
    assert result.exit_code == 0, result.output
    assert seen == [(False, False), (True, True)]
    assert result.stdout.index("inference:") < result.stdout.index("training:")
    both = json.loads(run("inspect", "attncc_cli_target:factory", "--train", "--json").stdout)
    assert list(both) == ["inference", "training"]


def test_a_program_is_not_trained(tmp_path: Path, explained: list[Any]) -> None:
    torch.export.save(torch.export.export(torch.nn.Linear(2, 3), (torch.zeros(1, 2),)), tmp_path / "linear.pt2")
    result = run("inspect", "linear.pt2", "--train")
    assert result.exit_code == 2 and "an exported program is not trained" in result.output


def test_inspect_program(tmp_path: Path, explained: list[Any]) -> None:
    torch.export.save(torch.export.export(torch.nn.Linear(2, 3), (torch.zeros(1, 2),)), tmp_path / "linear.pt2")
    assert run("inspect", "linear.pt2").exit_code == 0
    assert isinstance(explained[0][0], torch.export.ExportedProgram)


def test_json_is_the_report_alone() -> None:
    result = run("inspect", "attncc_cli_target:factory", "--json")
    assert json.loads(result.stdout) == json.loads(json.dumps(REPORT.to_dict()))


def test_html_is_a_page_in_a_file(tmp_path: Path, explained: list[Any]) -> None:
    out = tmp_path / "new" / "report.html"
    result = run("inspect", "attncc_cli_target:factory", "--html", str(out))
    assert result.exit_code == 0 and result.stdout == f"{out}: 2 sites: 1 fused, 0 kept, 1 refused\n"
    assert "<h1>attncc_cli_target:factory</h1>" in out.read_text() and [*out.parent.iterdir()] == [out]
    (tmp_path / "file").write_text("")
    refused = run("inspect", "attncc_cli_target:factory", "--html", str(tmp_path / "file" / "report.html"))
    assert refused.exit_code == 2 and f"attncc: {tmp_path / 'file' / 'report.html'}: " in refused.stderr


def test_kernel_is_printed_to_the_byte() -> None:
    assert run("inspect", "attncc_cli_target:factory", "--kernel", "0").stdout == SOURCE


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--ir"], "# site 0: layers.0.attn\nattention(...)"),
        (["--ir"], "# refused: softmax over an axis"),
        (["--graph", "before"], "def forward(before)"),
        (["--graph", "after"], "def forward(after)"),
        (["--mask", "0"], "##"),
    ],
)
def test_parts_are_printed_without_the_table(options: list[str], says: str) -> None:
    result = run("inspect", "attncc_cli_target:factory", *options)
    assert result.exit_code == 0
    assert says in result.stdout
    assert "1 fused" not in result.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nosuch_module_of_anyone:thing"], "no module named"),
        (["attncc_cli_target:absent"], "has no 'absent'"),
        (["absent.pt2"], "no such file"),
        (["attncc_cli_target:raising"], "running the model raised ValueError: bad shape of this model"),
        (["attncc_cli_target:uncompiled"], "compiling the model raised ValueError: bad shape more"),
        (["attncc_cli_target:factory", "--kernel", "7"], "there is no site 7; sites are 0 to 1"),
        (["attncc_cli_target:factory", "--kernel", "1"], "site 1 has no kernel (refused: softmax over"),
        (["attncc_cli_target:factory", "--mask", "1"], "site 1 has no picture"),
    ],
)
def test_bad_input_gives_one_line_and_code_2(args: list[str], says: str) -> None:
    result = run("inspect", *args)
    assert result.exit_code == 2
    assert result.stdout == ""
    line, rest = result.stderr.replace("noise of the model\n", "").split("\n", 1)
    assert line.startswith(f"attncc: {args[0]}: ")
    assert says in line
    assert rest == ""


@pytest.mark.parametrize("target", ["cut.pt2", "nosuch_module_of_anyone:thing"])
def test_the_process_prints_one_line_without_a_traceback(tmp_path: Path, target: str) -> None:
    torch.export.save(torch.export.export(torch.nn.Linear(2, 3), (torch.zeros(1, 2),)), tmp_path / "whole.pt2")
    (tmp_path / "cut.pt2").write_bytes((tmp_path / "whole.pt2").read_bytes()[:-30])
    command = [sys.executable, "-c", "from attncc.cli.app import main; main()", "inspect", target]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"attncc: {target}: ")
    shown = subprocess.run([*command, "--debug"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 2
    assert "Traceback" in shown.stderr


def test_the_model_is_quiet_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "attncc_cli_noisy.py").write_text(
        "import logging, torch, warnings\n"
        "def factory():\n"
        "    print('printed'); warnings.warn('warned'); logging.getLogger('noise').error('logged')\n"
        "    return torch.nn.Identity(), (torch.zeros(1),)\n"
    )
    with warnings.catch_warnings(record=True) as seen:
        result = run("inspect", "attncc_cli_noisy:factory", "--json")
    assert json.loads(result.stdout)
    assert seen == []
    assert "logged" not in result.stderr


def test_debug_adds_the_traceback() -> None:
    result = run("inspect", "attncc_cli_target:raising", "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert "ValueError: bad shape\nmore" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("attncc: attncc_cli_target:raising: ")


def test_no_site_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attncc, "explain", lambda *_, **__: Report())
    assert run("inspect", "attncc_cli_target:factory").stdout == "no attention found\n"
    assert "no attention was found" in run("inspect", "attncc_cli_target:factory", "--kernel", "0").stderr


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with two kernels and a record."""
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(tmp_path / "kernels"))
    store = Store()
    for name in ("dense-f32", "causal-f32"):

        def build(folder: Path, name: str = name) -> None:
            (folder / "kernel.so").write_bytes(b"12345")
            (folder / "kernel.cpp").write_text(f"// {name}\nint x;\n")

        store.get_or_build(key({"source": name}), name, build)
    store.remember(key({"a": 1}), {"winner": "cpp"})
    return store


@pytest.mark.parametrize("command", [("cache",), ("cache", "list")])
def test_cache_lists(kernels: Store, command: tuple[str, ...]) -> None:
    shown = run(*command).stdout
    assert "dense-f32" in shown and "causal-f32" in shown
    assert f"2 kernels, 0.0 MiB, and 1 records, in {kernels.root}" in shown


def test_cache_shows_one(kernels: Store) -> None:
    entry = next(x for x in kernels.entries() if x.name == "dense-f32")
    for name in ("dense-f32", entry.path.name, entry.key[:8]):
        shown = run("cache", "show", name).stdout
        assert entry.key in shown and "every file is what was built" in shown
        assert "kernel.cpp, kernel.so, manifest.json" in shown
    assert run("cache", "show", "dense-f32", "--source").stdout == "// dense-f32\nint x;\n"
    missing = run("cache", "show", "absent")
    assert missing.exit_code == 2 and "there is no kernel absent" in missing.stderr


def test_cache_verifies_and_prunes(kernels: Store) -> None:
    assert run("cache", "verify").stdout == "2 kernels, all in order\n"
    entry = next(x for x in kernels.entries() if x.name == "dense-f32")
    (entry.path / "kernel.so").write_bytes(b"123456")
    result = run("cache", "verify")
    assert result.exit_code == 1
    assert f"{entry.path.name}: is not what was built" in result.stdout and "2 kernels, 1 not in order" in result.stdout
    assert run("cache", "prune").stdout.startswith("removed 1 kernel ")
    assert run("cache", "verify").stdout == "1 kernel, all in order\n"
    assert run("cache", "prune", "--limit", "0").stdout.startswith("removed 0 kernels ")  # used within the hour
    os.utime(kernels.entries()[0].path / "manifest.json", (0, 0))
    assert run("cache", "prune", "--limit", "0").stdout.startswith("removed 1 kernel ")


def test_cache_clears(kernels: Store) -> None:
    assert run("cache", "clear").stdout.startswith("removed 2 kernels ")
    assert "0 kernels, 0.0 MiB, and 0 records" in run("cache").stdout
    assert kernels.recall(key({"a": 1})) is None


def test_cache_says_what_others_could_write_to(kernels: Store) -> None:
    kernels.root.chmod(0o777)
    result = run("cache")
    assert result.exit_code == 0 and "0 kernels" in result.stdout
    assert f"others could write to {kernels.root}" in result.stderr


def test_cache_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNCC_CACHE_DIR", str(tmp_path / "file"))
    result = run("cache")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("attncc: cache: ")
    assert result.stderr.count("\n") == 1


def test_a_suite_for_another_machine() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = run("bench", "--suite", "gpu")
    assert result.exit_code == 2
    assert result.stderr.startswith("attncc: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--json", "--plot", "--table"])
def test_a_file_that_cannot_be_written_is_found_out_before_measuring(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "run", lambda **_: pytest.fail("measured"))
    missing = run("bench", option, str(tmp_path / "none" / "x.json"))
    assert missing.exit_code == 2 and f"there is no folder {tmp_path / 'none'}" in missing.stderr
    assert run("bench", option, str(tmp_path)).exit_code == 2


_SUITES = ["cpu", "windows", "longcontext", "compile", "policies", "context", "sites", "models"]


@pytest.mark.parametrize("suite", _SUITES)
def test_rows_that_no_suite_has_are_refused(suite: str) -> None:
    refused = run("bench", "--suite", suite, "--rows", "a row of nobody")
    assert refused.exit_code == 2 and "'a row of nobody'" in refused.stderr, refused.output
    assert run("bench", "--suite", suite, "--rows", "a row of nobody, " + _A_ROW.get(suite, "causal")).exit_code == 2


_A_ROW = {"cpu": "dense", "windows": "Mistral", "compile": "bert", "policies": "blocks", "sites": "bert",
          "models": "MiniLM"}  # fmt: skip


def test_names_of_rows_hold_no_comma_which_separates_them() -> None:
    names = [*windows.MODELS, *longcontext.MASKS, *context.MASKS, *compiling.cases((4,))]
    names += [r.row.name for quick in (True, False) for r in cpu_rows.rows(quick=quick)]
    assert len(names) > 50 and not [name for name in names if "," in name]


def test_versions_are_printed() -> None:
    shown = run("--version")
    assert shown.exit_code == 0 and shown.stdout.startswith(f"attncc {attncc.__version__}, torch {torch.__version__}")
    done = subprocess.run([sys.executable, "-m", "attncc", "--version"], capture_output=True, text=True)
    assert done.stdout == shown.stdout, done.stderr


def test_remeasuring_is_asked_for_while_a_model_is_inspected(monkeypatch: pytest.MonkeyPatch) -> None:
    inspecting, seen = importlib.import_module("attncc.cli.inspect"), list[str | None]()

    def examine(*_: object, **__: object) -> None:
        seen.append(os.environ.get("ATTNCC_REMEASURE"))
        raise TargetError("seen")

    monkeypatch.delenv("ATTNCC_REMEASURE", raising=False)
    monkeypatch.setattr(inspecting, "load", lambda target: target)
    monkeypatch.setattr(inspecting, "examine", examine)
    for options in ([], ["--remeasure"], []):
        assert run("inspect", "a:b", *options).exit_code == 2
    assert seen == [None, "all", None] and "ATTNCC_REMEASURE" not in os.environ
