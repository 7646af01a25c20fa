"""Terms are values: interned, immutable, kinded."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from random_ir.expressions import Pair, pairs

from attncc.ir import Const, Expr, Index, KindError, Load, Op, S, Size, Var
from attncc.ir.build import FALSE, ONE, TRUE, ZERO, add, and_, cast, const, eq, le, lt, mul, not_, op, sub, where
from attncc.ir.rewrite import rewrite, substitute
from attncc.ir.terms import OPS, free, loads, walk

I, J, N = Index("i"), Index("j"), Size("N")  # noqa: E741


def test_equal_terms_are_one_object() -> None:
    assert Index("i") is Index("i")
    assert Op("add", (I, J)) is Op("add", (I, J))
    assert Load("t", (I, J), "int") is Load("t", (I, J), "int")


def test_terms_that_only_python_calls_equal_are_apart() -> None:
    ones = [Const(1), Const(1.0), Const(True)]
    assert len(set(ones)) == 3
    assert [x.kind for x in ones] == ["int", "float", "bool"]
    assert Const(-0.0) is not Const(0.0)
    assert math.copysign(1, Const(-0.0).value) == -1
    assert Const(0) is not Const(False)
    assert Index("x") is not Size("x")
    assert Load("t", (I,), "int") is not Load("t", (I,), "float")


def test_nan_is_interned() -> None:
    assert Const(math.nan) is Const(float("nan"))
    assert Const(math.nan) is Const(-math.nan)


@pytest.mark.parametrize("value", [None, "1", 1j, torch.tensor(1), [1]])
def test_a_constant_is_a_python_number(value: object) -> None:
    with pytest.raises(TypeError, match="a constant is a Python bool, int or float"):
        Const(value)  # type: ignore[arg-type]


def test_terms_are_immutable() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        I.name = "j"
    with pytest.raises(AttributeError, match="immutable"):
        add(I, J).extra = 1  # type: ignore[attr-defined]


def test_terms_nobody_holds_are_forgotten() -> None:
    made = {id(Op("mul", (Const(123457), I)))}
    gc.collect()
    again = Op("mul", (Const(123457), J))
    assert again.args[1] is J
    assert made  # the first is gone: only its former address was kept


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(pairs())
def test_copies_and_pickles_are_the_same_object(pair: Pair) -> None:
    for x in pair:
        assert pickle.loads(pickle.dumps(x)) is x
        assert copy.deepcopy(x) is x
        assert copy.copy(x) is x


def test_threads_building_the_same_terms_get_the_same_objects() -> None:
    threads = 8

    def build(barrier: Barrier, salt: int) -> list[Expr]:
        barrier.wait()
        made: list[Expr] = []
        for n in range(60):
            x = Op("add", (Index(f"thread{salt}_{n}"), Const(10_000 * salt + n)))
            made += [x, Op("mul", (x, x)), Load("t", (x,), "float")]
            assert [m.kind for m in made[-3:]] == ["int", "int", "float"]
        return made

    with ThreadPoolExecutor(threads) as pool:
        for salt in range(20):
            barrier = Barrier(threads)
            first, *rest = [f.result() for f in [pool.submit(build, barrier, salt) for _ in range(threads)]]
            for other in rest:
                assert all(a is b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("add", (I, S), "one kind"),
        ("add", (I,), "takes 2 arguments, got 1"),
        ("add", (TRUE, TRUE), "cannot take a bool"),
        ("div", (I, J), "cannot take a int"),
        ("floordiv", (S, S), "cannot take a float"),
        ("and", (TRUE, I), "cannot take a int"),
        ("not", (I,), "cannot take a int"),
        ("where", (I, S, S), "cannot take a int"),
        ("where", (TRUE, S, I), "one kind"),
        ("lt", (I, S), "one kind"),
        ("eq", (TRUE, FALSE), "cannot take a bool"),
        ("exp", (I,), "cannot take a int"),
        ("cbrt", (S,), "no operation 'cbrt'"),
    ],
)
def test_kind_errors(name: str, args: tuple[Expr, ...], message: str) -> None:
    for make in (lambda: Op(name, args), lambda: op(name, *args)):
        with pytest.raises(KindError, match=message):
            make()


@pytest.mark.parametrize("make", [
    lambda: add(ZERO, S), lambda: mul(const(1.0), I), lambda: and_(TRUE, I), lambda: where(TRUE, S, I),
    lambda: not_(ONE),
])  # fmt: skip
def test_kinds_are_checked_even_where_folding_would_hide_them(make: object) -> None:
    with pytest.raises(KindError):
        make()  # type: ignore[operator]


def test_result_kinds() -> None:
    assert add(I, J).kind == "int"
    assert mul(S, S).kind == "float"
    assert lt(I, J).kind == "bool"
    assert where(lt(I, J), S, const(0.0)).kind == "float"
    assert where(lt(I, J), I, J).kind == "int"
    assert cast(lt(I, J), "float").kind == "float"
    assert cast(I, "bool").kind == "bool"
    assert cast(S, "bool") is op("ne", S, const(0.0))
    assert cast(S, "float") is S


def test_every_operation_has_a_kind_rule_that_names_its_letters() -> None:
    for name, rule in OPS.items():
        assert set(rule.takes) <= set("nibfa"), name
        assert rule.gives in "nibfa", name


def test_walk_gives_children_first_and_each_once() -> None:
    shared = add(I, J)
    root = mul(shared, sub(shared, N))
    order = list(walk(root))
    assert order == [I, J, shared, N, sub(shared, N), root]


def test_walk_is_not_recursive() -> None:
    x: Expr = S
    for n in range(5000):
        x = Op("add", (x, Load("bias", (I, const(n)), "float")))
    assert sum(1 for _ in walk(x)) > 10_000
    assert substitute(x, {I: J}) is not x


def test_free_and_loads() -> None:
    x = where(le(J, I), add(S, Load("bias", (I, Load("map", (J,), "int")), "float")), const(0.0))
    assert free(x) == {I, J, S}
    assert [n.tensor for n in loads(x)] == ["map", "bias"]


def test_substitute_reaches_into_loads_and_folds() -> None:
    x = add(Load("bias", (add(I, J),), "float"), cast(sub(I, J), "float"))
    y = substitute(x, {I: const(2), J: const(3)})
    assert y is add(Load("bias", (const(5),), "float"), const(-1.0))


def test_substitution_is_simultaneous() -> None:
    assert substitute(sub(I, J), {I: J, J: I}) is sub(J, I)


def test_rewrite_sees_rewritten_children() -> None:
    seen: list[Expr] = []

    def rule(x: Expr) -> Expr | None:
        seen.append(x)
        return J if x is I else None

    assert rewrite(add(I, N), rule) is add(J, N)
    assert seen == [I, N, add(J, N)]


def test_comparison_of_itself_is_decided_for_integers_only() -> None:
    w = Var("w")
    assert eq(I, I) is TRUE
    assert lt(I, I) is FALSE
    assert isinstance(eq(w, w), Op)  # NaN differs from itself
