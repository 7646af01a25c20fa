"""Conversion of ONNX files: to ONNX again by surgery, and to everything else through torch.export."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import Dim, ExportedProgram

from attncc.convert.checking import Trial, agree
from attncc.convert.onnx_tracing import UnequalSizes, dtype_of, name_of, shape_of, sizes_of, traced
from attncc.frontends.onnx.reading import every_node, opset_of, read
from attncc.frontends.onnx.running import OnnxModule, missing
from attncc.frontends.targets import TargetError, one_line
from attncc.ir.reasons import Reason, because
from attncc.progress import step
from attncc.report.model import Report
from attncc.runtime.measure import TIE
from attncc.runtime.measure import compare as timed
from attncc.version import __version__

if TYPE_CHECKING:
    import onnx_ir as ir

    from attncc.convert.onnx_surgery import Asked, Operated

#: More data than this does not fit into the file itself (protobuf ends at 2 GiB).
MOST_INSIDE = 1_800_000_000
#: How long both files are timed, in seconds: on a busy machine less tells nothing.
MEASURED_S = 2.0


#: Providers by the names that users give.
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def runs(provider: str) -> bool:
    """Whether onnxruntime has a provider here; true of its CPU, and where it is not installed, which a session says."""
    try:
        import onnxruntime as ort  # noqa: PLC0415 an extra
    except ImportError:
        return True
    return PROVIDERS[provider] in ort.get_available_providers()


def beside(path: Path) -> Path:
    """Where the library of a model's own operators lies."""
    return path.with_name(f"{path.name}.so")


@dataclass(frozen=True)
class Session:
    """A file as onnxruntime runs it with a provider, as a function of its inputs in order."""

    path: Path
    provider: str = "cpu"

    def __post_init__(self) -> None:
        try:
            import onnxruntime as ort  # noqa: PLC0415 an extra
        except ImportError as error:
            raise TargetError(f"{self.path}: checking needs onnxruntime; pip install 'attncc[onnx]', or give --no-check"
                              ) from error  # fmt: skip
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            if (library := beside(self.path)).is_file():
                options.register_custom_ops_library(str(library))
            names = [PROVIDERS[x] for x in dict.fromkeys((self.provider, "cpu"))]
            made = ort.InferenceSession(str(self.path), options, providers=names)
        except Exception as error:
            raise TargetError(f"{self.path.name}: onnxruntime does not load it ({one_line(error)})") from error
        object.__setattr__(self, "_session", made)

    @property
    def names(self) -> list[str]:
        """The names of its inputs, in order."""
        session: Any = self._session  # type: ignore[attr-defined]
        return [v.name for v in session.get_inputs()]

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        session: Any = self._session  # type: ignore[attr-defined]
        feed = {v.name: x.numpy() for v, x in zip(session.get_inputs(), inputs, strict=True)}
        return tuple(torch.from_numpy(x) for x in session.run(None, feed))


def made_up(model: ir.Model, sizes: Mapping[str, int]) -> tuple[torch.Tensor, ...]:
    """Inputs of a model for sizes of its open dimensions: normal floats, and integers of 0 and 1, the first along the
    last dimension 1, so that a mask shows something."""
    generator = torch.Generator().manual_seed(0)
    found: list[torch.Tensor] = []
    for v in model.graph.inputs:
        if v.name in model.graph.initializers:
            continue
        shape, dtype = shape_of(v, sizes), dtype_of(v)
        if dtype.is_floating_point:
            found.append(torch.randn(shape, generator=generator).to(dtype))
            continue
        x = torch.randint(0, 2, shape, generator=generator)
        if x.ndim:
            x[..., :1] = 1
        found.append(x.to(dtype))
    return tuple(found)


#: Which open dimensions are sums of two others.
Sums = Mapping[str, tuple[str, str]]
#: Names of open dimensions that are looked through for such.
_MOST_NAMES = 6


def every_size(model: ir.Model, first: Mapping[str, int], sums: Sums) -> list[dict[str, int]]:
    """Sizes to check with: the first ones, one more of each and more than twice as many, as the open dimensions say."""
    if not first:
        return [{}]
    grown: list[dict[str, int]] = []
    for change in (lambda n: n + 1, lambda n: 2 * n + 3):
        sizes = sizes_of(model, {n: change(s) for n, s in first.items() if "+" not in n})
        grown.append(sizes | {t: sizes[a] + sizes[b] for t, (a, b) in sums.items()})
    return [dict(first), *grown]


def exported(path: str) -> ExportedProgram:
    """The program of an ONNX file, its open dimensions left open. Raises TargetError."""
    model = _known(path)
    sizes = sizes_of(model)
    inputs = made_up(model, sizes)
    own = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    shapes = tuple(
        {at: Dim.DYNAMIC for at, n in enumerate(v.shape or ()) if not isinstance(n, int)} for v in own
    )  # fmt: skip
    module = OnnxModule(model)
    try:
        with torch.no_grad():
            return torch.export.export(
                module, inputs, dynamic_shapes=(shapes,) if any(shapes) else None, strict=False
            )
    except TargetError as error:
        raise TargetError(f"{path}: {error}") from error
    except Exception as error:
        raise TargetError(f"{path}: torch.export cannot export it ({one_line(error)})") from error


def _known(path: str) -> ir.Model:
    """The model of a file, all of whose operators have rows. Raises TargetError."""
    model = read(path)
    unknown = missing(model)
    if unknown:
        raise TargetError(f"{path}: holds operators that are not known here: {', '.join(unknown[:8])}")
    opset = opset_of(model)
    newer = [x for x in dict.fromkeys(n.op_type for n in every_node(model)) if not _has(x, opset)]
    if newer:
        raise TargetError(f"{path}: says opset {opset}, which has no {newer[0]}; torch's exporter writes such files "
                          "where it is asked for opset 26 or 27")  # fmt: skip
    return model


def _has(op: str, opset: int) -> bool:
    """Whether a version of the standard has an operator; true where onnx is not installed."""
    try:
        from onnx import defs  # noqa: PLC0415 an extra
    except ImportError:
        return True
    try:
        defs.get_schema(op, opset)
    except defs.SchemaError:
        return False
    return True


@dataclass(frozen=True)
class Found:
    """What became of a model: its report, what was said of the check, and whether the rewritten one was slower: it
    stayed as it was then."""

    report: Report
    checked: str = ""
    slower: bool = False


def rewrite(path: str, output: Path | None, *, checked: bool, measure: bool, asked: Asked) -> Found:
    """Rewrite the attentions of an ONNX file into another, `output` (a place that may be written to), as it is asked
    for; attncc's own kernels lie beside it. Raises TargetError, CheckError.

    Where onnxruntime runs its own operators slower than what was given, the standard ones are tried."""
    every = [asked]
    if measure and asked.kernels is None and asked.target != "onnx" and asked.provider == "cpu":
        every.append(replace(asked, target="onnx"))
    found = Found(Report(()))
    for n, one in enumerate(every):
        found = _rewritten(path, output, checked=checked, measure=measure, asked=one)
        if not found.slower:
            if n:
                note = f"written for {one.target}: operators of {asked.target} were slower than the model's own nodes"
                return replace(found, report=replace(found.report, notes=(*found.report.notes, note)))
            return found
    return found


def _rewritten(path: str, output: Path | None, *, checked: bool, measure: bool, asked: Asked) -> Found:
    step("finding attention")
    model, sizes, found = operated(path, asked)
    report = Report(tuple(found.sites), versions={"attncc": __version__, "torch": torch.__version__})
    if output is None:
        return Found(report)
    step(f"writing {output.name}")
    if not found.count:
        return _unchanged(path, output, report)
    save(model, output)
    if asked.kernels is not None and asked.kernels.called:
        asked.kernels.write(beside(output))
    if not checked:
        return Found(report)
    if not runs(asked.provider):
        return Found(report, f"not checked: onnxruntime has no {asked.provider.upper()} provider here")
    before, after = Session(Path(path), asked.provider), Session(output, asked.provider)
    sizes, sums = _that_run(before, model, sizes)
    said = agree(before, after, _trials(model, every_size(model, sizes, sums)))
    if measure:
        slower = _slower(before, after, made_up(model, sizes))
        if slower:
            kept = tuple(
                replace(s, status="kept", reason=str(slower), code=slower.codes, became="its own nodes")
                if s.status == "fused" else s
                for s in report.sites
            )
            return replace(_unchanged(path, output, replace(report, sites=kept)), slower=True)
    return Found(report, said)


def operated(path: str, asked: Asked) -> tuple[ir.Model, dict[str, int], Operated]:
    """(the model with its attentions rewritten, sizes of its open dimensions, what was found)."""
    from attncc.convert.onnx_surgery import operate  # noqa: PLC0415 needs onnx-ir

    model = _upgraded(_known(path), path, asked.opset)
    try:
        sizes, trace = _traced(model)
    except TargetError as error:
        raise TargetError(f"{path}: {error}") from error
    return model, sizes, operate(model, trace, asked)


def _unchanged(path: str, output: Path, report: Report) -> Found:
    """The model of a file as it is, with its data, and what is reported then."""
    for old in list(output.parent.iterdir()):
        old.unlink()
    _save(read(path), output)
    return Found(replace(report, notes=("nothing was rewritten; the file is as it was",)))


def _traced(model: ir.Model) -> tuple[dict[str, int], Any]:
    """The trace, with the sizes of open dimensions that it was made for. Where dimensions of other names have to be
    equal, those that a run tells, or the first ones of all inputs, are taken to be."""
    sizes = sizes_of(model)
    for _ in range(len(sizes) + 1):
        try:
            return sizes, traced(model, sizes)
        except UnequalSizes as error:
            one, other = (sizes[n] for n in error.names)
            equal = {n: one if s == other else s for n, s in sizes.items()}
        except TargetError:
            equal = _with_equal_firsts(model, sizes)
        if equal == sizes:
            break
        sizes = equal
    return sizes, traced(model, sizes)


def _with_equal_firsts(model: ir.Model, sizes: Mapping[str, int], size: int | None = None) -> dict[str, int]:
    """Sizes with which the first dimensions of all inputs, where they are open, are equal: `size`, or as the first."""
    firsts = [name_of(v, 0) for v in model.graph.inputs if v.shape and not isinstance(v.shape[0], int)]
    return {n: (size or sizes[firsts[0]]) if n in firsts else s for n, s in sizes.items()}


def _that_run(before: Session, model: ir.Model, sizes: Mapping[str, int]) -> tuple[Mapping[str, int], Sums]:
    """Sizes that the model takes, and which of them are sums of two: as they are, or as files need them that do not say
    what they need. Some are exported for any batch, and run for one; a mask is as long as the past and the new tokens
    together."""
    equal, single = _with_equal_firsts(model, sizes), _with_equal_firsts(model, sizes, 1)
    tries: list[tuple[Mapping[str, int], Sums]] = [(sizes, {}), (equal, {}), (single, {})]
    for base in (equal, single):
        tries += [({**base, t: base[a] + base[b]}, {t: (a, b)}) for t, a, b in _sums(model)]
    best, most = tries[0], 0
    for tried, sums in tries:
        every = every_size(model, tried, sums)
        runs = next((n for n, s in enumerate(every) if not _runs(before, model, s)), len(every))
        if runs > most:
            best, most = (tried, sums), runs
        if runs == len(every):
            break
    return best


def _runs(session: Session, model: ir.Model, sizes: Mapping[str, int]) -> bool:
    try:
        session(*made_up(model, sizes))
    except Exception:
        return False
    return True


def _sums(model: ir.Model) -> Iterator[tuple[str, str, str]]:
    """Which open dimension of an input of integers may be the sum of two others."""
    inner = [(name_of(v, at), dtype_of(v)) for v in model.graph.inputs if v.name not in model.graph.initializers
             for at, n in enumerate(v.shape or ()) if at and not isinstance(n, int)]  # fmt: skip
    names = list(dict.fromkeys(n for n, _ in inner))[:_MOST_NAMES]
    for t in dict.fromkeys(n for n, dtype in inner if not dtype.is_floating_point):
        yield from ((t, a, b) for a, b in combinations([n for n in names if n != t], 2))


def _upgraded(model: ir.Model, path: str, opset: int) -> ir.Model:
    """The model with the standard operators of a version, or of its own where that is newer."""
    import onnx_ir as ir  # noqa: PLC0415

    if opset_of(model) < opset:
        try:
            import onnx  # noqa: PLC0415
            from onnx import version_converter  # noqa: PLC0415
        except ImportError as error:
            raise TargetError(f"{path}: a model of an older opset needs onnx; pip install 'attncc[onnx]'") from error
        if sum(x.nbytes for x in _inside(model)) > MOST_INSIDE:
            raise TargetError(f"{path}: of opset {opset_of(model)} and too large to be converted to {opset}")
        try:
            newer: onnx.ModelProto = version_converter.convert_version(ir.to_proto(model), opset)
            model = ir.from_proto(newer)
        except Exception as error:
            raise TargetError(f"{path}: onnx cannot convert it to opset {opset} ({one_line(error)})") from error
        ir.external_data.set_base_dir(model.graph, Path(path).parent)
    model.ir_version = max(model.ir_version or 0, 10)
    return model


def _inside(model: ir.Model) -> list[Any]:
    import onnx_ir as ir  # noqa: PLC0415

    every = [v.const_value for v in model.graph.initializers.values()]
    return [x for x in every if x is not None and not isinstance(x, ir.ExternalTensor)]


def save(model: ir.Model, path: Path) -> None:
    """Write a model, and read it again as onnxruntime would. Data goes into a file beside it where there is much, or
    where there was one."""
    _save(model, path)
    read(path)


def _save(model: ir.Model, path: Path) -> None:
    import onnx_ir as ir  # noqa: PLC0415

    every = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    apart = sum(x.nbytes for x in every) > MOST_INSIDE or any(isinstance(x, ir.ExternalTensor) for x in every)
    try:
        ir.save(model, path, external_data=f"{path.name}.data" if apart else None)
    except Exception as error:
        raise TargetError(f"{path.name}: cannot be written ({one_line(error)})") from error


def _trials(model: ir.Model, every: Sequence[Mapping[str, int]]) -> list[Trial]:
    """Made-up inputs of several sizes."""
    named = [", ".join(f"{n} = {s}" for n, s in sizes.items()) or "the sizes of the model" for sizes in every]
    return [Trial(name, lambda x=x: (made_up(model, x), {})) for name, x in zip(named, every, strict=True)]


def _slower(before: Session, after: Session, inputs: tuple[torch.Tensor, ...]) -> Reason | None:
    """Why the rewritten file is not taken, where onnxruntime runs it slower."""
    step("measuring both in onnxruntime")
    us = timed({"before": lambda: before(*inputs), "after": lambda: after(*inputs)}, MEASURED_S).us
    if us.get("after", float("inf")) <= us["before"] * (1 + TIE):
        return None
    return because("slower", f"onnxruntime {us.get('after', math.inf):.1f} us, as it was {us['before']:.1f} us")


