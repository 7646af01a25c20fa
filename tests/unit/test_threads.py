"""Threads and forks around kernels: what a thread worked in goes with it, and no lock of attncc's stays held."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from attentions.dense import attention
from cpp_kernels.build import build, host_isas

from attncc.runtime.forks import Guard

pytestmark = pytest.mark.slow


def resident() -> int:
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS:")).split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_thread_that_ends_leaves_no_working_memory() -> None:
    """560 KB stayed for each one."""
    q = torch.randn(1, 4, 128, 64)
    kernel = build(attention(q, q, q), host_isas()[0])
    out = torch.empty(1, 4, 128, 64)

    def run() -> None:
        kernel([q, q, q], [], [out])

    def threads(count: int) -> None:
        for _ in range(count):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()

    before_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        threads(20)
        before = resident()
        threads(100)
        assert resident() - before < 100 * 100_000
    finally:
        torch.set_num_threads(before_threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_lock_that_another_thread_holds_is_free_in_a_child() -> None:
    guard, held, done = Guard(), threading.Event(), threading.Event()

    def hold() -> None:
        with guard():
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        with guard():
            os._exit(0)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


FORKED = """
import os, signal, sys, threading, time
import torch
import attncc
from pathlib import Path
from attncc.kernels import build
from attncc.kernels.build import built
from attncc.runtime import measure
from attncc.runtime.store import Store, key
from attncc.ir import print_attention
sys.path.insert(0, sys.argv[1])
from attentions.dense import attention

torch.set_num_threads(1)
q = torch.randn(1, 2, 40, 16)
spec = print_attention(attention(q, q, q))
want = torch.nn.functional.scaled_dot_product_attention(q, q, q)
store, name = build.default_store(), key({"a": 1})
inside, done = threading.Event(), threading.Event()

def building(folder):
    (folder / "x").write_text("x")
    inside.set()
    done.wait(60)

def measuring():
    measure.compare({"slow": lambda: done.wait(60)}, 0.1)

# whatever attncc locks is held by other threads while this one forks: a build, a measurement, a site
threads = [threading.Thread(target=store.get_or_build, args=(name, "other", building)),
           threading.Thread(target=measuring)]
for t in threads:
    t.start()
assert inside.wait(60)
time.sleep(0.1)
child = os.fork()
if child == 0:
    signal.alarm(60)
    out = torch.ops.attncc.attention([q, q, q], [], spec)[0]
    assert torch.allclose(out, want, atol=1e-5)
    assert store.remember("record", {"a": 1}) and store.recall("record") == {"a": 1}
    assert measure.compare({"fast": lambda: None}, 0.01).winner == "fast"
    os._exit(0)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
done.set()
for t in threads:
    t.join()
sys.exit(code != 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_in_the_middle_of_everything_computes(tmp_path: Path) -> None:
    support = Path(__file__).parents[1] / "support"
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(support)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "ATTNCC_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
