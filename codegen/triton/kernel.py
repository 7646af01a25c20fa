"""One kernel of a file: its text and what its launcher must know."""

from __future__ import annotations

from dataclasses import dataclass

from attncc.codegen.triton.frame import Frame, Parameter


@dataclass(frozen=True)
class Kernel:
    """`helpers` are the names of the functions that the text calls, `steps` the strides of rows of the operands."""

    name: str
    parameters: tuple[Parameter, ...]
    helpers: frozenset[str]
    text: str
    steps: tuple[Parameter, ...] = ()


def kernel(frame: Frame, name: str, more: tuple[Parameter, ...] = ()) -> Kernel:
    """What a frame has become, with `more` parameters after its own."""
    parameters = (*frame.parameters, *more)
    sizes = {frame.scope.known[z] for z in frame.p.a.sizes}
    plain = ", ".join(f'"{x.name}"' for x in frame.parameters if x.name in sizes)
    decorator = f"@triton.jit(do_not_specialize=[{plain}])" if plain else "@triton.jit"
    names = [x.name + (": tl.constexpr" if x.type == "constexpr" else "") for x in parameters]
    body = (f"    {x}" for x in frame.scope.lines)
    text = "\n".join([decorator, f"def {name}(", *wrapped(names, "    "), "):", *body])
    return Kernel(name, parameters, frozenset(frame.scope.helpers), text, tuple(frame.steps))


def wrapped(parts: list[str], indent: str, width: int = 110) -> list[str]:
    lines, line = list[str](), ""
    for part in parts:
        if line and len(line) + len(part) + 2 > width:
            lines.append(indent + line.rstrip())
            line = ""
        line += f"{part}, "
    return [*lines, indent + line.rstrip()] if line else lines


PARTS = (Parameter("part_ptr", "*fp32", "part"), Parameter("stat_ptr", "*fp32", "stat"))
FLAGS = Parameter("flags_ptr", "*u8", "flags")
LISTS = (Parameter("blocks_ptr", "*i32", "blocks"), Parameter("counts_ptr", "*i32", "counts"))
BLOCK_COUNT = Parameter("block_count", "i32", "block_count")
