"""What one iteration does with a block of keys: scores, the running softmax, the weighted sum of values."""

from __future__ import annotations

from typing import Literal

from attncc.codegen.triton.expressions import Scope
from attncc.codegen.triton.frame import Frame
from attncc.codegen.triton.peak import Peak
from attncc.codegen.triton.schedule import TL_TYPES
from attncc.codegen.triton.segments import Striped
from attncc.ir import Const, Expr, S, W
from attncc.ir.analysis import members
from attncc.ir.build import TRUE, and_, le, lt, mod, not_, sub
from attncc.ir.expr import free

#: What a pass over the keys is for. online: softmax and sum of values in one; stats: the largest score and the sum of
#: weights alone; apply: weights from known statistics; plain: weights that need none; seen: whether there is a key.
Mode = Literal["online", "stats", "apply", "plain", "seen"]

#: Weights are rounded before they are multiplied: the share that is left out stays under its bound by more than that.
CUT = 0.98


class Block:
    """Emits what comes before the loops over keys into a frame's outermost scope, and gives the loops their bodies."""

    def __init__(self, frame: Frame) -> None:
        self.f, self.p = frame, frame.p
        self.j = frame.names.fresh(self.p.a.j.name)
        self.gathered = self.boxed = False
        self.peak = Peak(frame)

    @property
    def accumulators(self) -> list[str]:
        return ["acc"] if len(self.p.e_chunks) == 1 else [f"acc{n}" for n in range(len(self.p.e_chunks))]

    def constants(self, operands: tuple[str, ...] = ("k", "v")) -> None:
        """Offsets inside a tile that no iteration changes."""
        f, p = self.f, self.p
        f.line("keys = tl.arange(0, BLOCK_N)[:, None]")
        for who, o, axis, letter, parts in (
            ("k", p.k, p.a.d, "d", p.d_chunks),
            ("v", p.v, p.a.e, "e", p.e_chunks),
        ):
            if who not in operands:
                continue
            f.line(f"{who}_at = {f.origin(o)}")
            step, inner = f.scope.atom(o.along(p.a.j)), f.scope.atom(o.along(axis))
            for n, (width, start) in enumerate(parts):
                name = self._chunk(letter, n, parts)
                f.line(f"{name} = {f'{start} + ' if start else ''}tl.arange(0, {width})[None, :]")
                f.line(f"{self._chunk(f'{who}_in', n, parts)} = keys * {step} + {name} * {inner}")
            if p.descriptors and "k" in operands:
                self._describe(who, step, p.d_size if who == "k" else p.e_size, parts)

    def _describe(self, who: str, step: str, extent: int, parts: tuple[tuple[int, int], ...]) -> None:
        """Descriptors of this batch point's keys or values: a box that reaches past the end reads zeros there."""
        self.f.line("if TMA:")
        for n, (width, _) in enumerate(parts):
            shape = f"[{self.f.scope.text(self.p.a.j.extent)}, {extent}], [{step}, 1], [BLOCK_N, {width}]"
            self.f.line(f"    {self._chunk(f'{who}_desc', n, parts)} = tl.make_tensor_descriptor({who}_at, {shape})")

    def _load(self, scope: Scope, who: str, n: int, guard: str, cast: str, *, whole: bool) -> None:
        """One chunk of the block's keys or values. `whole` says that no key is left out but those past the end."""
        p = self.p
        parts = p.d_chunks if who == "k" else p.e_chunks
        name = self._chunk(who, n, parts)
        inside = self._chunk(f"{who}_in", n, parts)
        if self.gathered:
            o, axis, letter = (p.k, p.a.d, "d") if who == "k" else (p.v, p.a.e, "e")
            inside = f"{self._chunk(letter, n, parts)} * {self.f.scope.atom(o.along(axis))}"
        load = f"{name} = tl.load({who}_block + {inside}{guard}){cast}"
        if not (self.boxed and whole):
            scope.lines.append(load)
            return
        box = f"{name} = {self._chunk(f'{who}_desc', n, parts)}.load([j0, {parts[n][1]}]){cast}"
        scope.lines += ["if TMA:", f"    {box}", "else:", f"    {load}"]

    def _block(self, scope: Scope, who: str) -> None:
        """Where the block's keys or values lie: a pointer, or one for each key of gathered ones."""
        step = self.f.scope.atom((self.p.k if who == "k" else self.p.v).along(self.p.a.j))
        scope.lines.append(f"{who}_block = {who}_at + {'jv' if self.gathered else 'j0'}.to(tl.int64) * {step}")

    @staticmethod
    def _chunk(name: str, n: int, parts: tuple[tuple[int, int], ...]) -> str:
        return name if len(parts) == 1 else f"{name}{n}"

    def queries(self) -> None:
        f, p = self.f, self.p
        if not self._needs_scores:
            return
        rows = f.offset(f.scope, [(x.index, p.q.along(x)) for x in (*p.folded, p.a.i)])
        f.line(f"q_at = {f.origin(p.q)}" + (f" + ({rows})" if rows else ""))
        inner = f.scope.atom(p.q.along(p.a.d))
        for n, part in enumerate(p.d_chunks):
            d, q = self._chunk("d", n, p.d_chunks), self._chunk("q", n, p.d_chunks)
            mask = self._guard("row_ok", d, part, p.d_size)
            at = f"q_at + {d} * {inner}" + ("" if rows else f" + tl.zeros([{f.rows}, 1], tl.int32)")
            f.line(f"{q} = tl.load({at}, {mask}, other=0){self._to(p.a.q.tensor, p.dot_type)}")

    @property
    def _needs_scores(self) -> bool:
        a = self.p.a
        return any(S in free(x) for x in (a.score, a.weight)) or self.p.softmax

    def _guard(self, ok: str, index: str, part: tuple[int, int], extent: int) -> str:
        inside = f"{index} < {extent}" if sum(part) > extent else ""
        if ok and inside:
            return f"mask={ok} & ({inside})"
        return f"mask={ok or inside}" if ok or inside else ""

    def _to(self, tensor: str, dtype: str) -> str:
        return "" if self.p.a.tensor(tensor).dtype == dtype else f".to({TL_TYPES[dtype]})"

    def body(self, mode: Mode, *, masked: bool, stripes: Striped | None = None) -> Scope:
        scope = self.f.scope.inner()
        self.gathered = stripes is not None and not self.in_whole_blocks(stripes)
        self.boxed = self.p.descriptors and stripes is None  # a box past an end inside the keys would read hidden ones
        if stripes is None:
            scope.lines.append("j0 = block * BLOCK_N")
        self._keys(scope, self.j, "[None, :]", masked=masked, stripes=stripes)
        if mode == "seen":
            visible = self._visible(scope, masked=masked)
            each = f"tl.where({visible}, {self._ones('BLOCK_N')}, 0)"
            some = f"tl.max({each}, 1)[:, None]" if visible else self._ones("1")
            scope.lines.append(f"seen = tl.maximum(seen, {some})")
            return scope
        ok = self._visible_columns(scope, masked=masked, stripes=stripes)
        if self._needs_scores:
            self._product(scope, ok)
        visible = self._visible(scope, masked=masked)
        self._weigh(scope, mode, visible)
        if mode == "online" and self.p.a.spare is not None:
            before, scope.lines = scope.lines, []
            self._values(scope, ok)
            scope.lines = [*before, "if kept > 0:", *(f"    {x}" for x in scope.lines)]
        elif mode != "stats":
            self._values(scope, ok)
        return scope

    def _ones(self, keys: str) -> str:
        return f"tl.full([{self.f.rows}, {keys}], 1, tl.int32)"

    def _keys(self, scope: Scope, name: str, shape: str, *, masked: bool, stripes: Striped | None) -> None:
        """Name the keys of the block, as a row or a column, and say which of them there are: the scope's guard."""
        guard = "j_ok" if shape == "[None, :]" else "jv_ok"
        scope.define(self.p.a.j.index, name)
        if stripes is not None and self.gathered:
            scope.lines.append(f"slot = (slot0 + tl.arange(0, BLOCK_N)){shape}")
            scope.lines.append(f"{name} = {self.place(stripes, 'slot')}")
        else:
            column = shape == "[:, None]"
            scope.lines.append(f"{name} = j0 + keys" if column else f"{name} = (j0 + tl.arange(0, BLOCK_N)){shape}")
        if stripes is not None:
            scope.lines.append(f"{guard} = {self._among(scope, stripes, name)}")
            scope.guard = guard
        elif masked and self.p.ragged:
            scope.lines.append(f"{guard} = {name} < {self.f.scope.atom(self.p.a.j.extent)}")
            scope.guard = guard

    def in_whole_blocks(self, x: Striped) -> bool:
        """Whether no block of slots reaches from one period into the next, so that its keys are neighbours."""
        return isinstance(x.width, Const) and int(x.width.value) % self.p.config.block_n == 0

    def place(self, x: Striped, slot: str) -> str:
        """The key in a slot: slots count the keys of all periods."""
        base, step, width = (self.f.scope.atom(n) for n in (x.base, x.step, x.width))
        inside = f"{slot} * {step}" if width == "1" else f"{slot} // {width} * {step} + {slot} % {width}"
        return f"{base} + {inside}"

    def _among(self, scope: Scope, x: Striped, j: str) -> str:
        """Whether a key is in the interval, and no other loop visits it."""
        atom = self.f.scope.atom
        parts = [f"({atom(x.lo)} <= {j})" if x.lo is not x.base else "", f"({j} < {atom(x.hi)})"]
        parts += [f"(({j} < {atom(r.start)} * BLOCK_N) | ({j} >= {atom(r.stop)} * BLOCK_N))" for r in x.but]
        for other in x.before:
            inside = and_(le(other.lo, self.p.a.j.index), lt(self.p.a.j.index, other.hi))
            inside = and_(inside, lt(mod(sub(self.p.a.j.index, other.base), other.step), other.width))
            parts.append(f"({scope.text(not_(inside))})")
        return " & ".join(n for n in parts if n)

    def _visible_columns(self, scope: Scope, *, masked: bool, stripes: Striped | None) -> str:
        """Which keys of the block any row may read, as a column: what no row may read is never loaded, whatever it
        holds."""
        p = self.p
        by_key = (x for x in members("and", p.a.mask) if not free(x) & p.row_leaves)
        condition = and_(*by_key) if masked else TRUE
        if not (masked and p.ragged) and stripes is None and condition is TRUE:
            return ""
        inner = self.f.scope.inner()
        self._keys(inner, "jv", "[:, None]", masked=masked, stripes=stripes)
        ok = [inner.guard] if inner.guard else []
        if condition is not TRUE and p.a.j.index in free(condition):
            ok.append(inner.atom(condition))
        scope.lines += inner.lines
        return " & ".join(ok)

    def _product(self, scope: Scope, ok: str) -> None:
        p = self.p
        self._block(scope, "k")
        for n, part in enumerate(p.d_chunks):
            k, q = self._chunk("k", n, p.d_chunks), self._chunk("q", n, p.d_chunks)
            guard = self._guard(ok, self._chunk("d", n, p.d_chunks), part, p.d_size)
            guard = f", {guard}, other=0" if guard else ""
            self._load(scope, "k", n, guard, self._to(p.a.k.tensor, p.dot_type), whole=ok in ("", "jv_ok"))
            plus = "" if n == 0 else "s, "
            scope.lines.append(f"s = tl.dot({q}, tl.trans({k}), {plus}{self._precision(p.dot_type)})")
        scope.define(S, "s")

    def _precision(self, dtype: str) -> str:
        precision = self.p.config.precision if dtype == "f32" else "ieee"
        return f'input_precision="{precision}"'

    def _visible(self, scope: Scope, *, masked: bool) -> str:
        """The condition under which a key counts for a row, or an empty text where all do."""
        p = self.p
        if not masked:
            return scope.guard or ""
        parts = [scope.guard] if scope.guard else []
        if p.a.mask is not TRUE:
            parts.append(scope.text(p.a.mask) if not parts else f"({scope.text(p.a.mask)})")
        if len(parts) < 1:
            return ""
        scope.lines.append(f"visible = {' & '.join(parts)}")
        return "visible"

    def _pair(self, scope: Scope, x: Expr) -> str:
        """`x` as a value for each row and key of the tile."""
        leaves = free(x)
        pair = S in leaves or W in leaves or (self.p.a.j.index in leaves and leaves & self.p.row_leaves)
        return scope.text(x) if pair else f"{scope.text(x)} + tl.zeros([{self.f.rows}, BLOCK_N], tl.float32)"

    def _weigh(self, scope: Scope, mode: Mode, visible: str) -> None:
        p, lines = self.p, scope.lines
        if mode == "plain":
            self._pointwise(scope, visible)
            return
        x = self._pair(scope, p.raw)
        lines.append(f"x = tl.where({visible}, {x}, float(\"-inf\"))" if visible else f"x = {x}")
        if mode in ("online", "stats"):
            lines += self.peak.raised("tl.max(x, 1)")
            lines.append("p = tl.exp2(x * rate[:, None] - base[:, None])")
            lines += self._spared() if mode == "online" and p.a.spare is not None else ["l = l * shrink + tl.sum(p, 1)"]
        if mode == "online":
            lines += [f"{acc} = {acc} * shrink[:, None]" for acc in self.accumulators]
            factor = p.factor
            assert factor is not None
            if factor is not Const(1.0):
                text = f"p * {scope.atom(factor)}"
                keep = visible and not isinstance(factor, Const)
                lines.append(f"p = tl.where({visible}, {text}, 0.0)" if keep else f"p = {text}")
        if mode == "apply":
            lines.append("p = tl.exp2(x * rate[:, None] - base[:, None]) * inverse")
            self._apply(scope, visible)

    def _spared(self) -> list[str]:
        """Lines that leave a block out where each row can spare what its weights there sum to: `dropped` stays under a
        share of what is kept, sums only grow, and a part of the share is left to the blocks to come."""
        return [
            "own = tl.sum(p, 1)", "met += 1.0", "dropped = dropped * shrink", "l = l * shrink",
            "spared = dropped + own < share * l * tl.minimum(met / meets, 1.0)",
            "kept = tl.max(tl.where(spared[:, None] | (row_ok == 0), 0, 1))",
            "l += tl.where(kept > 0, own, 0.0)", "dropped += tl.where(kept > 0, 0.0, own)",
        ]  # fmt: skip

    def _apply(self, scope: Scope, visible: str) -> None:
        p, lines = self.p, scope.lines
        seen = visible
        if p.empty == "mean":
            lines.append(f"p = tl.where(empty_row, 1.0 / {self.f.scope.atom(p.a.j.extent)}, p)")
            seen = f"({visible}) | empty_row" if visible else ""
        if p.empty == "nan":
            lines.append('p = tl.where(empty_row, float("nan"), p)')
            seen = f"({visible}) | empty_row" if visible else ""
        if p.empty == "mean" and p.ragged and visible:
            seen = f"({seen}) & j_ok"
        scope.define(W, "p")
        weight = self._pair(scope, p.a.weight)
        lines.append(f"p = tl.where({seen}, {weight}, 0.0)" if seen else f"p = {weight}")
        if "weights" in p.a.outputs:
            self.store_weights(scope)

    def _pointwise(self, scope: Scope, visible: str) -> None:
        p, lines = self.p, scope.lines
        x = self._pair(scope, p.raw)
        act = {"sigmoid": "tl.sigmoid(x)", "relu": "tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)"}
        lines.append(f"x = {x}")
        value = act.get(p.a.normalizer, "x")
        lines.append(f"p = tl.where({visible}, {value}, 0.0)" if visible else f"p = {value}")
        if p.a.weight is not W:
            scope.define(W, "p")
            weight = self._pair(scope, p.a.weight)
            lines.append(f"p = tl.where({visible}, {weight}, 0.0)" if visible else f"p = {weight}")
        if "weights" in p.a.outputs:
            self.store_weights(scope)

    def store_weights(self, scope: Scope) -> None:
        f, p = self.f, self.p
        at = f.output("weights", (*p.points, *p.folded, p.a.i))
        step = f.scope.atom(f.output_stride("weights", len(p.a.batch) + 1))
        j = scope.text(p.a.j.index)
        ok = "row_ok & j_ok" if scope.guard else "row_ok"
        scope.lines.append(f"tl.store({at} + {j} * {step}, p, mask={ok})")

    def _values(self, scope: Scope, ok: str) -> None:
        p = self.p
        self._block(scope, "v")
        kind = TL_TYPES[p.value_type]
        weights = "p" if p.value_type == "f32" else f"p.to({kind})"
        for n, part in enumerate(p.e_chunks):
            v, acc = self._chunk("v", n, p.e_chunks), self.accumulators[n]
            guard = self._guard(ok, self._chunk("e", n, p.e_chunks), part, p.e_size)
            guard = f", {guard}, other=0" if guard else ""
            self._load(scope, "v", n, guard, self._to(p.a.v.tensor, p.value_type), whole=ok in ("", "jv_ok"))
            scope.lines.append(f"{acc} = tl.dot({weights}, {v}, {acc}, {self._precision(p.value_type)})")

    def start(self) -> None:
        """Nothing seen yet."""
        f = self.f
        if self.p.softmax:
            f.scope.lines += self.peak.start(f.rows)
        for acc, (width, _) in zip(self.accumulators, self.p.e_chunks, strict=True):
            f.line(f"{acc} = tl.zeros([{f.rows}, {width}], tl.float32)")
        if self.p.a.spare is not None:
            f.comment("what each row may leave out of its weights, and what it has; the blocks it has met")
            share = f"{f.scope.atom(self.p.a.spare)} + tl.zeros([{f.rows}, 1], tl.float32)"
            f.line(f"share = tl.sum(({share}) * {CUT}, 1)")
            f.line(f"dropped = tl.zeros([{f.rows}], tl.float32)")
            f.line("met = 0.0")

    def mean_of_values(self) -> None:
        """Rows without visible keys: the mean of the values, times the weight's factor. Rare, so behind a test."""
        f, p = self.f, self.p
        f.comment("rows that see no key: the mean of all values")
        scope = f.scope.inner()
        scope.lines.append("j0 = block * BLOCK_N")
        scope.lines.append("jv = j0 + keys")
        ok = ""
        if p.ragged:
            scope.lines.append(f"jv_ok = jv < {f.scope.atom(p.a.j.extent)}")
            ok = "jv_ok"
        if p.factor is Const(1.0):
            step = f.scope.atom(p.v.along(p.a.j))
            scope.lines.append(f"v_block = v_at + j0.to(tl.int64) * {step}")
            for n, part in enumerate(p.e_chunks):
                guard = self._guard(ok, self._chunk("e", n, p.e_chunks), part, p.e_size)
                guard = f", {guard}, other=0" if guard else ""
                load = f"tl.load(v_block + {self._chunk('v_in', n, p.e_chunks)}{guard}).to(tl.float32)"
                acc = self.accumulators[n]
                scope.lines.append(f"{acc} += tl.where(empty_row, tl.sum({load} * each, 0)[None, :], 0.0)")
        else:
            scope.lines.append(f"{self.j} = (j0 + tl.arange(0, BLOCK_N))[None, :]")
            scope.define(p.a.j.index, self.j)
            if p.ragged:
                scope.lines.append(f"j_ok = {self.j} < {f.scope.atom(p.a.j.extent)}")
                scope.guard = "j_ok"
            assert p.factor is not None
            if S in free(p.factor):
                self._product(scope, ok)
            rows = f"empty_row{' & j_ok' if p.ragged else ''}"
            factor = self._pair(scope, p.factor)
            scope.lines.append(f"p = tl.where({rows}, ({factor}) * each, 0.0)")
            self._values(scope, ok)
        blocks = f"tl.cdiv({f.scope.atom(p.a.j.extent)}, BLOCK_N)"
        f.line("if tl.max(tl.where(empty_row, 1, 0)) > 0:")
        f.line(f"    each = 1.0 / {f.scope.atom(p.a.j.extent)}")
        for acc in self.accumulators:
            f.line(f"    {acc} = tl.where(empty_row, 0.0, {acc})")
        f.line(f"    for block in range(0, {blocks}):")
        f.scope.lines += [f"        {x}" for x in scope.lines]

