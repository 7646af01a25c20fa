"""Two versions of attncc side by side: they share a store, and none loads what the other made for itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import attncc
from attncc.kernels.build import find_toolchain
from attncc.runtime.store import Store

PROGRAM = """
import torch, attncc
from attncc.kernels.build import built
spec = '''attncc_spec'''
made = built(spec, "cpu")
assert made.language == "cpp", made.reason
q, k, v = (torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
(out,) = torch.ops.attncc.attention([q, k, v], [], spec)
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25))
print(attncc.__file__)
"""
SPEC = """attention
batch  b = 1, h = 2
axis   i = 40, j = 40, d = 8, e = 8
tensor q: f32[1, 2, 40, 8]
tensor k: f32[1, 2, 40, 8]
tensor v: f32[1, 2, 40, 8]
q      q[b, h, i, d]
k      k[b, h, j, d]
v      v[b, h, j, e]
score  s * 0.25
mask   j <= i
norm   softmax
empty  zero
weight w
give   out
dtype  f32
layout b, h, i, e
"""

GIVEN = "            in_type(*[t.data_ptr() for t in tensors]), in_strides, size_array,  # type: ignore[operator]\n"
WRITTEN = "            out_type(*[t.data_ptr() for t in outputs]), out_strides,  # type: ignore[operator]\n"
#: The other version passes the outputs first: what it compiled would write into the inputs here.
CHANGES = {
    "codegen/cpp/emitter.py": [
        (
            "const void* const* tensors, const int64_t* const* strides, const int64_t* sizes,\\n"
            '"\n            "    void* const* outputs, const int64_t* const* out_strides)',
            "void* const* outputs, const int64_t* const* out_strides,\\n"
            '"\n            "    const void* const* tensors, const int64_t* const* strides, const int64_t* sizes)',
        )
    ],
    "runtime/cpp.py": [
        (f"{GIVEN}{WRITTEN}", f"{WRITTEN}{GIVEN}"),
    ],
}


def other_version(folder: Path) -> Path:
    """A copy of the package with another calling convention."""
    shutil.copytree(Path(attncc.__file__).parent, folder / "attncc", ignore=shutil.ignore_patterns("__pycache__"))
    for name, changes in CHANGES.items():
        path = folder / "attncc" / name
        text = path.read_text()
        for old, new in changes:
            assert text.count(old) == 1, f"{name} has changed: {old}"
            text = text.replace(old, new)
        path.write_text(text)
    return folder


@pytest.mark.full
def test_two_versions_side_by_side(tmp_path: Path) -> None:
    if find_toolchain() is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "empty").mkdir()
    trees = [Path(attncc.__file__).parents[1], other_version(tmp_path)]
    entries: list[int] = []
    for tree in (*trees, *trees):
        environment = {**os.environ, "PYTHONPATH": str(tree), "ATTNCC_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.replace("attncc_spec", SPEC)], capture_output=True, text=True,
            env=environment, cwd=tmp_path / "empty", timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip() == str(tree / "attncc" / "__init__.py")
        entries.append(len(Store(tmp_path / "cache").entries()))
    assert entries == [1, 2, 2, 2]


def test_the_other_version_can_be_made(tmp_path: Path) -> None:
    """The test above runs by the day; what it changes must still be there."""
    assert (other_version(tmp_path) / "attncc" / "runtime" / "cpp.py").is_file()
