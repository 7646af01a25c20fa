"""From an attention to a kernel: the passes, the emitter for the device, the toolchain, the store."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any

import torch

from attncc.codegen import cpp, torch_form, triton
from attncc.ir import Attention, Bounds, parse_attention, print_attention
from attncc.kernels.compiled import NOT_MADE, checks, compiled, first_error, why_not_made
from attncc.kernels.first_use import Extra, check_of, differs
from attncc.kernels.skip_tables import BySize, Tabled
from attncc.kernels.tile_order import TileOrdered, movable
from attncc.passes.bounds.area import Area
from attncc.passes.bounds.bounds import loop_bounds
from attncc.passes.rewrites.drop_rounding import drop_rounding
from attncc.passes.rewrites.fold_predicates import fold_predicates
from attncc.passes.rewrites.forward_only import forward_only
from attncc.passes.rewrites.tile_choice import InTiles, in_tiles
from attncc.passes.tables.spans import Spanned, reads_by_key, spanned, tables
from attncc.runtime import compilers
from attncc.runtime.cpp import CompileError, CppKernelError, CppToolchain, Ranks, detect_isa
from attncc.runtime.notices import notice
from attncc.runtime.op import Kernel
from attncc.runtime.store import VARIABLE, Store, key
from attncc.runtime.triton_launch import TritonKernel, capability_of


@dataclass(frozen=True)
class Built:
    """A kernel with what a report says of it. `reason` is why it is not a compiled one, where it is not; `note` says
    more about the one there is; `isa` is the instruction set that it uses, or the capability of the GPU."""

    kernel: Kernel
    source: str
    language: str
    name: str
    reason: str = ""
    note: str = ""
    isa: str = ""

    @property
    def shown(self) -> str:
        note = self.kernel.note if isinstance(self.kernel, TileOrdered) else self.note
        return f"{self.name}, {note}" if note else self.name

    @property
    def told(self) -> str:
        """The same, with the reason where there is no compiled one."""
        return f"{self.shown}: {self.reason}" if self.reason else self.shown

    def area(self, row_major: Area | None) -> Area | None:
        """The area that the kernel visits, given that of the loop bounds in row-major order."""
        if row_major is not None and isinstance(self.kernel, TileOrdered):
            return self.kernel.area(row_major)
        return row_major


class TorchKernel:
    """The plain-torch form, for devices, dtypes and machines that have nothing better."""

    def __init__(self, a: Attention) -> None:
        self.attention = a

    def __call__(
        self, tensors: Sequence[torch.Tensor], sizes: Sequence[int], outputs: Sequence[torch.Tensor]
    ) -> None:
        for out, value in zip(outputs, blocked(self.attention, tensors, sizes), strict=True):
            out.copy_(value)


def blocked(a: Attention, tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    """The plain-torch form, which leaves out the keys that a block of rows does not see. Differentiable."""
    return torch_form.run_blocked(a, tensors, sizes, bounds=_bounds(a))


@lru_cache(maxsize=1024)
def _bounds(a: Attention) -> Bounds:
    return loop_bounds(optimise(a), rows=True)


@lru_cache(maxsize=1024)
def optimise(a: Attention) -> Attention:
    """What every kernel is made from: no rounding points, predicates in canonical form. Exact (or more accurate)."""
    return fold_predicates(drop_rounding(a))


@dataclass(frozen=True)
class Target:
    """What a kernel is made for: all that is read of the machine, the environment and torch's settings to make it.

    `arch` is the instruction set or the GPU's capability; `missing` says why there are no compiled kernels for it."""

    device: str
    arch: str = ""
    toolchain: CppToolchain | None = None
    tf32: bool = False
    missing: str = ""


def target_of(device: torch.device) -> Target:
    """The target of kernels that are made now for a device."""
    if device.type == "cuda":
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"  # `allow_tf32` raises once this one was set
        return Target("cuda", capability_of(device), tf32=tf32)
    if device.type != "cpu":
        return Target(device.type, missing=f"no emitter for device {device.type}")
    toolchain = find_toolchain()
    if toolchain is None:
        found = _toolchain(*_environment())
        return Target("cpu", missing=found if isinstance(found, str) else "no C++ compiler found")
    arch, missing = _isa(toolchain, os.environ.get("ATTNCC_ISA"))
    return Target("cpu", arch, toolchain, missing=missing)


def build_all(wanted: Iterable[tuple[str, str]], also: Iterable[Callable[[], object]] = ()) -> None:
    """Build the kernels of (spec, device) pairs, and what `also` builds, side by side: compilers run in processes of
    their own."""
    todo = [*(partial(built, *pair) for pair in dict.fromkeys(wanted)), *also]
    if len(todo) > 1:
        workers = min(len(todo), os.cpu_count() or 1)
        with ThreadPoolExecutor(workers, initializer=compilers.until_stopped, initargs=(compilers.stops(),)) as pool:
            try:
                list(pool.map(lambda job: job(), todo))
            except BaseException:  # interrupted: nobody waits for what is being compiled
                pool.shutdown(wait=False, cancel_futures=True)
                compilers.stop()
                raise


def build(a: Attention, spec: str, device: torch.device) -> Kernel:
    """The kernel of an attention on a device, for `attncc.runtime.op`."""
    return built(spec, str(device)).kernel


def built(spec: str, device: str) -> Built:
    """The kernel of a spec, compiled and kept in the store; where it cannot be, the plain-torch form and the reason."""
    return _built(spec, target_of(torch.device(device)))


@lru_cache(maxsize=1024)
def _built(spec: str, target: Target) -> Built:
    # tables that are part of a kernel are made here, whatever device, mode and transform its first user is in
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        a = optimise(forward_only(parse_attention(spec)))
        if target.missing:
            return _torch(a, target.missing)
        bounds = loop_bounds(a, rows=True)
        if target.device == "cpu":
            return _in_tiles(a, bounds, target, _skipping(a, target, _cpp(a, bounds, target)))
        return _listed(a, bounds, target, _triton(a, bounds, target))


def _skipping(a: Attention, target: Target, plain: Built) -> Built:
    """`plain`; where the mask reads data by key, with a second kernel for large calls, whose bounds read tables."""
    if plain.language == "torch" or not reads_by_key(a):
        return plain
    kernel, found = plain.kernel, spanned(a, by_looking="none")
    if found.spans or found.maps:
        kernel = Tabled(kernel, found, partial(_tabled_kernel, found, target))
    if found.more_by_looking:
        found = spanned(a, by_looking="quick")
        kernel = Tabled(kernel, found, partial(_tabled_kernel, found, target))
    return replace(plain, kernel=kernel)


def _tabled_kernel(found: Spanned, target: Target) -> Kernel:
    return _cpp(found.attention, found.bounds, target, partial(tables, found)).kernel


def _in_tiles(a: Attention, bounds: Bounds, target: Target, plain: Built) -> Built:
    """`plain`, or where a mask over a grid makes it less work, a kernel for tokens in tile order beside it."""
    if plain.language == "torch":
        return plain
    found = in_tiles(a, bounds)
    if isinstance(found, InTiles):
        found = movable(a) or found
    if found is None or isinstance(found, str):
        return replace(plain, note=_joined(plain.note, f"not in tile order: {found}" if found else ""))
    table = {found.attention.tensors[-1].name: found.table}
    tiled = _cpp(found.attention, found.bounds, target, lambda *_: table)
    if tiled.language == "torch":
        return replace(plain, note=_joined(plain.note, f"not in tile order: {tiled.reason}"))
    return replace(plain, kernel=TileOrdered(a, plain.kernel, found, tiled.kernel, default_store), source=tiled.source)


def _joined(*notes: str) -> str:
    return ", ".join(filter(None, notes))


def _listed(a: Attention, bounds: Bounds, target: Target, plain: Built) -> Built:
    """`plain`; where the mask reads data by key, with kernels for large calls that make lists of key blocks first."""
    if plain.language == "torch" or not triton.reads_by_key(a):
        return plain
    return replace(plain, kernel=BySize(a, plain.kernel, lambda: _triton(a, bounds, target, lists=True).kernel))


def _torch(a: Attention, reason: str) -> Built:
    return Built(TorchKernel(a), print_attention(a), "torch", "plain torch", reason)


def _cpp(
    a: Attention, bounds: Bounds, target: Target, extra: Extra | None = None, *, wide: bool = False
) -> Built:  # fmt: skip
    """The C++ kernel of `a`; `extra` makes the tensors that its bounds alone read. Calls with sizes beyond 2^24 get a
    `wide` one."""
    reason = cpp.unsupported(a)
    if reason is not None:
        return _torch(a, reason)
    assert target.toolchain is not None  # else the target would lack it
    try:
        source = cpp.emit(a, bounds, target.arch, wide=wide)
        name, store = kernel_name(a), default_store()
        larger = cache(lambda: _cpp(a, bounds, target, extra, wide=True).kernel) if a.sizes and not wide else None
        plain = partial(TorchKernel, a)
        check = check_of(a, extra)
        kernel = compiled(Ranks.of(a), source, target.arch, target.toolchain, name, store, check, plain, larger)
    except NOT_MADE as error:
        return _torch(a, why_not_made(error))
    isa = cpp.instructions(a, target.arch)
    return Built(kernel, source, "cpp", f"C++ {isa} kernel", note=target.toolchain.note, isa=isa)


def _triton(a: Attention, bounds: Bounds, target: Target, *, lists: bool = False) -> Built:
    reason = triton.unsupported(a)
    if reason is not None:
        return _torch(a, reason)
    space = triton.configs(a, bounds, target.arch, tf32=target.tf32, lists=lists)
    sources = [triton.emit(a, bounds, config) for config in space]
    rounding = 2.0**-10 if target.tf32 else 0.0
    check = partial(differs, a, rounding=rounding) if checks() else None
    store, plain = default_store(), partial(TorchKernel, a)
    kernel = TritonKernel(sources, remember=Remembered(store), check=check, report=notice, otherwise=plain)
    return Built(kernel, sources[0], "triton", f"Triton {target.arch} kernel", isa=target.arch)


class Remembered(dict[str, str]):
    """The store's records as the mapping of strings that a tuner keeps its choices in."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store

    def get(self, name: str, default: Any = None) -> Any:
        record = self.store.recall(key({"kind": "tuning", "name": name}))
        return default if record is None else record.get("choice", default)

    def __setitem__(self, name: str, choice: str) -> None:
        self.store.remember(key({"kind": "tuning", "name": name}), {"choice": choice})


def kernel_name(a: Attention) -> str:
    """A readable name: `masked-softmax-f32-d64`."""
    mask = "dense" if repr(a.mask) == "True" else "masked"
    return f"{mask}-{a.normalizer}-{a.tensor(a.q.tensor).dtype}-d{a.d.extent!r}"


def find_toolchain() -> CppToolchain | None:
    """The C++ compiler, looked for once for each environment."""
    found = _toolchain(*_environment())
    return None if isinstance(found, str) else found


def _environment() -> list[str | None]:
    return [os.environ.get(name) for name in ("ATTNCC_CXX", "CXX", "PATH")]


@lru_cache(maxsize=8)
def _toolchain(*_environment: str | None) -> CppToolchain | str:
    return CppToolchain.find_or_reason()


@lru_cache(maxsize=8)
def _isa(_toolchain: CppToolchain, _chosen: str | None) -> tuple[str, str]:
    """The instruction set to compile for, or what keeps all of them from it."""
    try:
        return detect_isa(), ""
    except (CppKernelError, CompileError) as error:
        return "", first_error(str(error))


def default_store() -> Store:
    """The store of this process; see `Store` for where it lies."""
    return _store(*map(os.environ.get, (VARIABLE, "XDG_CACHE_HOME", "HOME")))


@lru_cache(maxsize=8)
def _store(*_environment: str | None) -> Store:
    return Store()
