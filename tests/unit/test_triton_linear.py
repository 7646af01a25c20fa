"""Kernels of linear attention compile ahead of time for GPUs that are not here, within their memory and registers."""

import pytest

pytest.importorskip("triton")

from attentions.linear_forms import FORMS, plain
from triton_kernels.matrix import SHARED

from attncc.codegen.triton import LinearConfig, emit_linear, unsupported_linear
from attncc.runtime.triton_compile import TARGETS, compile_for

_FORMS = ("gated_delta", "by_channel", "delta_by_channel")


@pytest.mark.parametrize(
    ("form", "kernel", "target"),
    [
        pytest.param(form, kernel, target, marks=() if (form, kernel, target) == kept else pytest.mark.full)
        for kept in [("gated_delta", "steps", "gfx942")]
        for form in _FORMS for kernel in ("chunks", "steps") for target in TARGETS
    ],
)  # fmt: skip
def test_compiles(form: str, kernel: str, target: str) -> None:
    config = LinearConfig(precision="ieee" if target.startswith("gfx") else "tf32x3")
    built = compile_for(emit_linear(FORMS[form](plain(1, 2, 64, 64, 64)), config), config, target, kernel)
    assert built.shared_bytes <= SHARED[target]
    assert built.spills <= (512 if target == "sm_80" else 256)  # bytes a thread, around the loop
    if kernel == "chunks" and target in ("sm_80", "sm_90"):
        assert "mma" in built.text  # products run in tensor cores


@pytest.mark.parametrize(
    ("form", "dtype", "d", "reason"),
    [("features", "f32", 16, "quotient"), ("for_all", "f32", 16, "every query"), ("gated", "f64", 16, "float64"),
     ("gated", "f32", 300, "channels")],
)  # fmt: skip
def test_what_has_no_kernel(form: str, dtype: str, d: int, reason: str) -> None:
    a = FORMS[form](plain(1, 2, 64, d, 16, dtype))
    assert reason in str(unsupported_linear(a))
    with pytest.raises(ValueError, match=reason):
        emit_linear(a, LinearConfig())
