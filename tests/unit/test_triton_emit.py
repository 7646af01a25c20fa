"""The text the Triton emitter writes: whole files, what is refused and why, and what a machine has room for."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace

import pytest
from triton_kernels.cases import CASES, Case, text
from triton_kernels.matrix import Job, attention

from attncc.codegen.triton import (
    TritonConfig,
    configs,
    emit,
    emit_gradient,
    gradient_configs,
    reads_by_key,
    unsupported,
    unsupported_gradient,
)
from attncc.codegen.triton.config import fits
from attncc.codegen.triton.gradient_config import gradient_fits
from attncc.codegen.triton.operands import chunks
from attncc.codegen.triton.rows import row_axes
from attncc.ir import Attention, Bounds, Const, W, parse_attention
from attncc.ir.build import add, const, op
from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.gradient import gradient_of


def of(case: Case, dtype: str = "bf16") -> Attention:
    return parse_attention(text(case, dtype))


GOLDEN = ("causal", "documents", "decode", "t5 table", "causal block table", "window and columns")


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str, golden: Callable[[str, str], None]) -> None:
    a = of(CASES[name])
    config = TritonConfig(64, 64, 4, 3, split=name == "decode", lists="table" in name)
    source = emit(a, loop_bounds(a, rows=True), config)
    golden(f"triton_{name.replace(' ', '_')}.py", source)


def backward(case: Case, *, lists: bool = False, dtype: str = "bf16") -> str:
    a = replace(of(case, dtype), outputs=("out", "lse"))
    g = gradient_of(a, [t.name for t in a.tensors if t.kind == "float"])
    assert not isinstance(g, str), g
    config = TritonConfig(64, 64, 4, 2, lists=lists)
    return emit_gradient(g, loop_bounds(a, rows=True), loop_bounds(g.by_key, rows=True), config, config)


@pytest.mark.parametrize("name", ["causal", "t5 table", "causal block table"])
def test_golden_backward(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"triton_backward_{name.replace(' ', '_')}.py", backward(CASES[name], lists="block" in name))


def test_a_backward_skips_what_the_forward_skips() -> None:
    """Blocks before the diagonal are left out seen from the keys, and no mask is evaluated behind it."""
    source = backward(Case("j <= i", groups=1, heads=1))
    rows, keys = source.split("def gradient_keys(")
    keys = keys.split("SIGNATURES")[0]
    assert "for block in range(0, tl.minimum(t0, t1))" in rows.split("def gradient_rows(")[1]
    assert "t1 = i0 // 64" in keys and keys.count("visible = ") == 1


def test_no_backward_sums_by_atomics() -> None:
    for name in ("causal", "alibi", "t5 table", "bias of both", "one key head"):
        assert "atomic" not in backward(CASES[name])


def test_what_has_no_backward() -> None:
    a = replace(of(CASES["empty rows mean"]), outputs=("out", "lse"))
    g = gradient_of(a, ["q", "k", "v"])
    assert not isinstance(g, str) and "mean of all values" in (unsupported_gradient(g) or "")
    with pytest.raises(ValueError, match="mean of all values"):
        emit_gradient(g, loop_bounds(a), loop_bounds(g.by_key), TritonConfig(), TritonConfig())


def test_backward_configurations_fit_the_machine() -> None:
    for capability in ("sm_75", "sm_80", "sm_90", "sm_100", "gfx942"):
        for case, dtype in ((Case("j <= i", d=256), "bf16"), (Case(d=64), "f32"), (CASES["t5 table"], "bf16")):
            a = replace(of(case, dtype), outputs=("out", "lse"))
            g = gradient_of(a, [t.name for t in a.tensors if t.kind == "float"])
            assert not isinstance(g, str)
            space = gradient_configs(g, capability)
            assert 1 <= len(space) <= 4 and len({*space}) == len(space)
            for by_rows, by_keys in space:
                assert gradient_fits(g, by_rows, capability, by_key=False) or by_rows.block_m == 16
                assert gradient_fits(g, by_keys, capability, by_key=True) or by_keys.block_m == 16
                assert by_rows.block_m <= by_rows.block_n or "j - i" not in [x.over for x in g.loads]


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_python(name: str) -> None:
    a = of(CASES[name])
    for config in (TritonConfig(64, 64), TritonConfig(16, 32, split=True), TritonConfig(64, 64, lists=True)):
        source = emit(a, loop_bounds(a, rows=True), config)
        tree = ast.parse(source)
        functions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
        assert "attention" in functions and "launch" in functions
        assert all(line in source for line in a_text(a))


def a_text(a: Attention) -> list[str]:
    return [f"    norm   {a.normalizer}", f"    dtype  {a.dtype}"]


def test_a_group_reads_its_key_head_once() -> None:
    """Rows of all heads of a group are one tile: the grid counts key heads, and no group is in the address of keys."""
    grouped = of(CASES["one key head"])
    source = emit(grouped, loop_bounds(grouped), TritonConfig(64, 64))
    assert "rows = 5 * N" in source and "g = row % 5" in source
    (keys,) = [x for x in source.splitlines() if x.strip().startswith("k_at =")]
    assert "g" not in keys.split("=")[1].replace("k_ptr", "")


def test_causal_visits_no_block_past_the_diagonal_and_masks_none_before_it() -> None:
    a = of(Case("j <= i", groups=1, heads=1))
    first, again = emit(a, loop_bounds(a), TritonConfig(64, 64)).split("rows whose weights sum to zero")
    assert first.count("for block in range(") == 2
    assert first.count("visible = ") == 1
    assert again.count("tl.load(") == 0  # whether such a row sees a key is asked of the mask alone
    everywhere = emit(a, Bounds(loop_bounds(a).visit), TritonConfig(64, 64))
    assert everywhere.split("rows whose weights sum to zero")[0].count("for block in range(") == 1


def test_a_mask_of_blocks_is_looked_at_block_by_block() -> None:
    """One key stands for all that the table tells not apart; a mask that is one literal needs no second look."""
    a = of(CASES["block table"])
    source = emit(a, loop_bounds(a), TritonConfig(64, 16, lists=True))
    body = source[source.index("def look(") : source.index("def pack(")]
    assert "tl.arange(0, 1))" in body and "tl.arange(0, BLOCK_N)" not in body
    assert "if some" not in body
    assert "hk" in body and "size_B" not in source[source.index("    lists =") : source.index("    block_count =")]


def test_lists_are_only_for_masks_that_hide_keys() -> None:
    a = of(CASES["dense"])
    assert "look" not in emit(a, loop_bounds(a), TritonConfig(64, 64, lists=True))
    assert not reads_by_key(a) and not reads_by_key(of(CASES["causal"])) and reads_by_key(of(CASES["documents"]))


def test_dense_whole_blocks_have_no_mask() -> None:
    a = parse_attention(text(Case(groups=1), "bf16").replace("j = N", "j = 256").replace("HK, N", "HK, 256"))
    source = emit(a, loop_bounds(a), TritonConfig(64, 64))
    assert "visible" not in source and "jv_ok" not in source and "range(0, 4)" in source


def test_head_sizes_that_16_does_not_divide_load_several_elements_at_once() -> None:
    """Triton looks for strides that are multiples of 16; of 8 the launcher tells, where all rows of a call have it."""
    a = of(Case(d=72, e=40))
    source = emit(a, loop_bounds(a), TritonConfig(64, 64))
    assert "k_s2 = k_s2 // 8 * 8" in source and "even = all(step % 8 == 0 for step in steps)" in source
    assert "q_s3 = " not in source  # one in a contiguous tensor
    assert "EVEN" not in emit(of(Case(d=80)), loop_bounds(a), TritonConfig(64, 64))
    assert "// 4 * 4" in emit(of(Case(d=12)), loop_bounds(a), TritonConfig(64, 64))


def test_precision_of_float32_is_exact_unless_asked() -> None:
    a = of(CASES["causal"], "f32")
    assert 'input_precision="tf32"' not in emit(a, loop_bounds(a), configs(a, loop_bounds(a), "sm_90")[0])
    assert 'input_precision="tf32"' in emit(a, loop_bounds(a), configs(a, loop_bounds(a), "sm_90", tf32=True)[0])


def test_what_is_refused() -> None:
    plain = of(CASES["dense"])
    assert unsupported(plain) is None
    wide = replace(plain, tensors=tuple(replace(t, dtype="f64") for t in plain.tensors))
    assert "float64" in (unsupported(wide) or "")
    assert "head size 1024" in (unsupported(replace(plain, d=replace(plain.d, extent=Const(1024)))) or "")
    crooked = replace(plain, k=replace(plain.k, index=tuple(op("floordiv", x, const(2)) for x in plain.k.index)))
    assert "affine" in (unsupported(crooked) or "")
    shifted = replace(plain, empty="nan", weight=add(W, const(1.0)))
    assert "unseen key" in (unsupported(shifted) or "")
    with pytest.raises(ValueError, match="float64"):
        emit(wide, loop_bounds(wide), TritonConfig())


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
@pytest.mark.parametrize("d", [4, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_configurations_fit_their_machine(target: str, d: int, dtype: str) -> None:
    for case in ("causal", "decode"):
        a = attention(Job(case, d, dtype, target))
        bounds = loop_bounds(a, rows=True)
        found = configs(a, bounds, target)
        assert 1 <= len(found) <= 7 and len(set(found)) == len(found)
        assert all(fits(a, row_axes(a, bounds), c, target) for c in found)
    with pytest.raises(ValueError, match="capability"):
        configs(a, bounds, "tpu")


def test_chunks_cover_a_head_with_little_padding() -> None:
    for size in range(1, 513):
        parts = chunks(size)
        assert sum(w for w, _ in parts) >= size
        assert all(w >= 16 and w & (w - 1) == 0 for w, _ in parts)
        assert parts[0][1] == 0 and all(start == parts[0][0] for _, start in parts[1:])
    assert chunks(192) == ((128, 0), (64, 128)) and chunks(80) == ((64, 0), (16, 64)) and chunks(128) == ((128, 0),)
