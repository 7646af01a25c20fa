"""Every kernel of the declared matrix compiles ahead of time for four targets, on tensor cores, without spilling in its
loops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("triton")

from triton_kernels.cases import CASES
from triton_kernels.matrix import SHARED, SPILL_BYTES, Built, Job, Matrix

from attncc.runtime.triton_compile import TARGETS

pytestmark = pytest.mark.slow

FORMS = (
    ("dense", 64, "bf16"),
    ("causal", 128, "bf16"),
    ("documents", 64, "f16"),
    ("soft cap", 128, "bf16"),
    ("t5 table", 64, "bf16"),
    ("padding", 64, "bf16"),
    ("d 192, e 128", 192, "bf16"),
    ("decode", 128, "bf16"),
)
#: Each form for one target, in turn; for the others it is compiled in the larger matrix.
MATRIX = [Job(*form, TARGETS[n % len(TARGETS)]) for n, form in enumerate(FORMS)]
MATRIX += [Job("decode", 128, "bf16", t, kernel="join") for t in ("sm_80", "gfx942")]
MATRIX += [Job("causal", 64, "f32", "sm_90"), Job("causal", 64, "f32", "sm_80", tf32=True)]
MATRIX += [Job("causal", 128, "bf16", t, descriptors=True) for t in ("sm_90", "sm_100")]
MATRIX += [Job("causal block table", 64, "bf16", t, lists=True) for t in TARGETS]
MATRIX += [Job("causal block table", 64, "bf16", t, kernel=k, lists=True) for k in ("look", "pack") for t in TARGETS]
MATRIX += [Job("causal", 128, "bf16", t, persistent=True) for t in ("sm_90", "sm_100")]
MATRIX += [Job("causal", 128, "bf16", "sm_100", at=2, descriptors=True)]  # with warps of their own for loads
MATRIX += [Job(case, 128, "bf16", "sm_90") for case in ("window and blocks by head", "stripes by head")]
#: Backward kernels, which hold twice the sums of a forward.
MATRIX += [Job("causal", 128, "bf16", t, kernel="gradient_keys") for t in TARGETS]
MATRIX += [Job("t5 table", 64, "bf16", "sm_80", kernel="gradient_rows")]
BACKWARD = [Job(case, d, dtype, t, kernel=f"gradient_{k}", at=at) for t in TARGETS for at in (0, 3)
            for k in ("rows", "keys") for case, d, dtype in (
                ("causal", 64, "bf16"), ("causal", 128, "bf16"), ("causal", 80, "f16"), ("soft cap", 64, "bf16"),
                ("bias of both", 64, "bf16"), ("t5 table", 64, "bf16"), ("documents", 64, "bf16"))]  # fmt: skip
BACKWARD += [Job("causal", d, dtype, t, kernel=f"gradient_{k}") for t in TARGETS for k in ("rows", "keys")
             for d, dtype in ((256, "bf16"), (64, "f32"), (128, "f32"))]  # fmt: skip
BACKWARD += [Job("sink", 64, "bf16", t, kernel="gradient_statistics") for t in TARGETS]
BACKWARD += [Job("clusters", 64, "bf16", t, kernel=k, lists=True) for t in TARGETS
             for k in ("gradient_rows", "gradient_keys", "look_keys")]  # fmt: skip

LARGE = [Job(*form, target) for form in FORMS for target in TARGETS]
LARGE += [Job(case, 64, "bf16", t) for case in CASES if not case.startswith("d ") for t in TARGETS]
LARGE += [Job("causal", d, "bf16", t) for d in (4, 8, 16, 32, 48, 64, 72, 80, 96, 112, 128, 160, 192, 224, 256)
          for t in TARGETS]  # fmt: skip
LARGE += [Job(case, 128, dtype, t, at=at) for case in ("dense", "causal", "sliding window", "decode")
          for dtype in ("f16", "f32") for t in TARGETS for at in (0, 1)]  # fmt: skip
LARGE = [job for job in dict.fromkeys([*LARGE, *BACKWARD]) if job not in MATRIX]


def name_of(job: Job) -> str:
    return "-".join(str(x).replace(" ", "_") for x in job)


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest) -> Iterator[Matrix]:
    wanted = {item.callspec.params["job"] for item in request.session.items if item.path == request.path}
    started = Matrix([job for job in [*MATRIX, *LARGE] if job in wanted])
    yield started
    started.close()


def check(job: Job, built: Built) -> None:
    c = built.compiled
    assert c.binary
    assert c.shared_bytes <= SHARED[job.target]
    assert c.spills <= SPILL_BYTES
    if job.kernel not in ("attention", "gradient_rows", "gradient_keys"):
        return
    assert any(instruction in c.text for instruction in products(job, built)), f"no matrix product of {job.target}"
    if job.descriptors:
        assert "cp.async.bulk.tensor" in c.text
    assert built.loops, "no loop with matrix products was found in the machine code"
    assert [x.local for x in built.loops] == [0] * len(built.loops), "local memory in a loop over keys"


def products(job: Job, built: Built) -> tuple[str, ...]:
    """The instructions the products must have become. Exact float32 has none on tensor cores."""
    if job.target.startswith("gfx"):
        return ("v_mfma_f32",)
    if job.dtype == "f32":
        return ("mma.sync", "wgmma.mma_async") if job.tf32 else ("fma.rn.f32",)
    if built.config.block_m < 64 or job.target == "sm_80":  # warp groups and tensor memory take 64 rows or more
        return ("mma.sync",)
    return ("wgmma.mma_async",) if job.target == "sm_90" else ("tcgen05.mma",)


@pytest.mark.parametrize("job", MATRIX, ids=name_of)
def test_compiles(job: Job, matrix: Matrix) -> None:
    check(job, matrix[job])


@pytest.mark.full
@pytest.mark.parametrize("job", LARGE, ids=name_of)
def test_larger_matrix_compiles(job: Job, matrix: Matrix) -> None:
    check(job, matrix[job])
