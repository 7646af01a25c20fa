"""Finding a compiler, and compilers that hang, die, or write something that is no kernel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from compilers.faulty import faulty

from attncc.runtime import compilers, cpp
from attncc.runtime.cpp import CompileError, CppToolchain, loaded, whole
from attncc.runtime.libraries import damage

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="the compilers are shell scripts")]

SOURCE = """
#ifndef VISIBLE
#define VISIBLE default
#endif
static double table[4096] = {1.0};
extern "C" __attribute__((visibility("default"))) double* table_of() { return table; }
#define quoted(x) #x
#define visible(x) __attribute__((visibility(quoted(x))))
extern "C" visible(VISIBLE) int attncc_run() { return 7; }
"""


def children() -> set[str]:
    """The processes of this test run whose command is `sleep 600`."""
    done = subprocess.run(["pgrep", "-f", "^sleep 600$"], capture_output=True, text=True)
    return set(done.stdout.split())


def compiled(path: Path, out: Path) -> None:
    CppToolchain(str(path)).compile(SOURCE, "avx2" if os.uname().machine == "x86_64" else "neon", out)
    whole(out)


def test_a_library_that_is_whole(tmp_path: Path) -> None:
    compiled(faulty(tmp_path, 'exec "$real" "$@"'), tmp_path / "kernel.so")
    data = (tmp_path / "kernel.so").read_bytes()
    assert damage(data, "attncc_run") is None
    libraries = [loaded(data) for _ in range(3)]
    assert [x.attncc_run() for x in libraries] == [7, 7, 7]
    assert len({x._handle for x in libraries}) == 3  # none is taken for another
    assert sorted(x.name for x in tmp_path.iterdir()) == ["faulty-g++", "kernel.so"]


@pytest.mark.skipif(sys.platform != "linux", reason="headers are read on Linux")
def test_a_library_that_is_cut_anywhere_is_not_loaded(tmp_path: Path) -> None:
    compiled(faulty(tmp_path, 'exec "$real" "$@"'), tmp_path / "kernel.so")
    data = (tmp_path / "kernel.so").read_bytes()
    for length in {0, 3, 4, 20, 63, 64, 100, 500, *range(0, len(data), 997), len(data) - 1}:
        with pytest.raises(CompileError, match=r"empty|no library|cut short|damaged|has no attncc_run"):
            loaded(data[:length])


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("truncates", "cut short"), ("keeps half", "cut short"), ("keeps a header", "cut short"),
        ("empties", "is empty"), ("writes nothing", "is not there"), ("writes text", "is no library"),
        ("makes a pipe", "not a regular file"), ("renames the entry", "has no attncc_run"),
        ("makes an object", "is no library"), ("crashes", "exit status -11"), ("exit 3", "exit status 3"),
        ("echo 'x: error: no' >&2; exit 1", "error: no"),
    ],
)  # fmt: skip
def test_what_is_no_kernel_is_a_failed_build(tmp_path: Path, fault: str, says: str) -> None:
    with pytest.raises(CompileError, match=says):
        compiled(faulty(tmp_path, fault), tmp_path / "kernel.so")


def test_an_entry_that_is_hidden(tmp_path: Path) -> None:
    path = faulty(tmp_path, "hides the entry")
    compiled(path, tmp_path / "kernel.so")  # the name is in the file
    with pytest.raises(CompileError, match="has no attncc_run"):
        loaded((tmp_path / "kernel.so").read_bytes())


@pytest.mark.parametrize("fault", ["hangs", "talks on"])
def test_a_compiler_that_does_not_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setenv("ATTNCC_COMPILE_TIMEOUT", "0.4")
    before, start = children(), time.monotonic()
    with pytest.raises(CompileError, match=r"did not finish within 0\.4 s \(ATTNCC_COMPILE_TIMEOUT"):
        compiled(faulty(tmp_path, fault), tmp_path / "kernel.so")
    assert time.monotonic() - start < 5
    assert children() <= before  # what it started is gone, too
    assert [x.name for x in tmp_path.iterdir()] == ["faulty-g++"]
    start = time.monotonic()
    with pytest.raises(CompileError, match="did not finish before"):  # the next kernel does not wait again
        compiled(tmp_path / "faulty-g++", tmp_path / "kernel.so")
    assert time.monotonic() - start < 0.3
    compilers.forget()
    with pytest.raises(CompileError, match="did not finish within"):
        compiled(tmp_path / "faulty-g++", tmp_path / "kernel.so")


@pytest.mark.skipif(sys.platform != "linux", reason="what a process works is read from /proc")
def test_a_compiler_that_works_on_a_busy_machine_has_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCC_COMPILE_TIMEOUT", "0.5")
    works_a_little = 'for n in 1 2 3 4; do sleep 0.3; for m in $(seq 4000); do :; done; done\nexec "$real" "$@"'
    monkeypatch.setattr(compilers, "_processor_seconds", lambda group: 0.1 * (time.monotonic() - start))
    start = time.monotonic()
    compiled(faulty(tmp_path, works_a_little), tmp_path / "kernel.so")
    assert time.monotonic() - start > 1
    monkeypatch.undo()
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"], process_group=0)
    try:
        until = time.monotonic() + 30
        while compilers._processor_seconds(child.pid) < 0.2 and time.monotonic() < until:
            time.sleep(0.05)
        assert compilers._processor_seconds(child.pid) >= 0.2
    finally:
        child.kill()
        child.wait()


def test_what_a_compiler_leaves_running_is_not_waited_for(tmp_path: Path) -> None:
    before, start = children(), time.monotonic()
    compiled(faulty(tmp_path, "leaves a child"), tmp_path / "kernel.so")
    assert time.monotonic() - start < 20 and children() <= before


def test_stopping_what_runs(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            compiled(faulty(tmp_path, "hangs"), tmp_path / "kernel.so")
        except compilers.Stopped as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until = time.monotonic() + 60
    while thread.is_alive() and time.monotonic() < until:  # what is started in the moment of a stop runs on
        compilers.stop()
        thread.join(0.1)
    assert not thread.is_alive() and "was stopped" in str(caught[0])


def test_a_thread_of_what_was_stopped_starts_no_other(tmp_path: Path) -> None:
    """Also one that had not come to its compiler when the user interrupted."""
    mark = tmp_path / "ran"
    found: list[str] = []

    def late(stops: int) -> None:
        compilers.until_stopped(stops)
        try:
            compilers.run(["sh", "-c", f"sleep 0.5; touch {mark}"])
        except compilers.Stopped as stopped:
            found.append(str(stopped))

    before = compilers.stops()
    compilers.stop()
    thread = threading.Thread(target=late, args=(before,))
    thread.start()
    thread.join()
    assert found == ["sh was stopped"] and not mark.exists()
    assert compilers.run(["sh", "-c", f"touch {mark}"]) == (0, "") and mark.exists()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("{folder}", "is a folder"), ("{folder}/absent", "is not found"),
        ("{folder}/text", "is not a program that can be run"), ("'", "is not a command"),
        ("absent-compiler -O2", "is not found"),
    ],
)  # fmt: skip
def test_a_name_that_names_no_compiler_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, says: str
) -> None:
    (tmp_path / "text").write_text("int main() {}")
    monkeypatch.delenv("ATTNCC_CXX", raising=False)
    monkeypatch.setenv("CXX", value.format(folder=tmp_path))
    found = CppToolchain.find()
    assert found is not None and found.path.endswith("++")
    assert says in found.note and found.note.startswith("CXX=") and found.note.endswith(f"{found.path} is used")
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = CppToolchain.find_or_reason()
    assert isinstance(missing, str) and says in missing and "no C++ compiler found" in missing


def test_a_command_of_several_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = faulty(tmp_path, 'exec "$real" "$@"')
    monkeypatch.setenv("ATTNCC_CXX", f"env LC_ALL=C '{real}'")
    found = CppToolchain.find()
    assert found is not None and found.note == "" and found.words == ("LC_ALL=C", str(real))
    assert "g++" in found.version
    found.compile(SOURCE, "avx2" if os.uname().machine == "x86_64" else "neon", tmp_path / "kernel.so")
    whole(tmp_path / "kernel.so")


def test_a_path_with_blanks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my tools").mkdir()
    path = faulty(tmp_path / "my tools", 'exec "$real" "$@"')
    monkeypatch.setenv("ATTNCC_CXX", str(path))
    found = CppToolchain.find()
    assert found is not None and found.command == (str(path),)


def test_a_file_that_only_looks_like_a_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "g++").write_bytes(b"\x00\x01\x02")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("ATTNCC_CXX", str(tmp_path / "g++"))
    monkeypatch.delenv("ATTNCC_ISA", raising=False)
    with pytest.raises(CompileError, match="cannot be run: Exec format error"):
        cpp.detect_isa()


def test_a_program_that_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNCC_CXX", "/bin/false")
    monkeypatch.delenv("ATTNCC_ISA", raising=False)
    with pytest.raises(cpp.CppKernelError, match="/bin/false compiles for none of"):
        cpp.detect_isa()


def test_an_interrupt_ends_the_compiler(tmp_path: Path) -> None:
    path = faulty(tmp_path, "hangs")
    program = (
        "import sys\nfrom pathlib import Path\nfrom attncc.runtime.cpp import CppToolchain\n"
        "try:\n    print('started', flush=True)\n"
        "    CppToolchain(sys.argv[1]).compile('', 'avx2', Path(sys.argv[2]) / 'kernel.so')\n"
        "except KeyboardInterrupt:\n    print('interrupted', flush=True)\n"
    )
    before = children()
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    until = time.monotonic() + 20
    while children() <= before and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == "interrupted\n"
    assert children() <= before and [x.name for x in tmp_path.iterdir()] == ["faulty-g++"]
