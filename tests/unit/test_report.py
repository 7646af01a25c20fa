"""The report: what it insists on, what it gives as plain values, and the table it prints."""

import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from attncc.report.model import Report
from attncc.report.site import HeadForm, Site, alike, merged_path, ranges

FUSED = Site(
    index=0, status="fused", path="encoder.layer.0.attention.self", where="modeling_bert.py:141",
    equation="softmax_j(s / 8)", mask="load(m, [b, 0, i, j])",
    shapes={"q": (2, 12, "n", 64), "k": (2, 12, "m", 64), "v": (2, 12, "n", 64)},
    visible=25, visited=50, total=100, became="C++ avx512 kernel", speedup=1.5, ir="attention ...", kernel="void f();",
    language="cpp",
)  # fmt: skip
KEPT = Site(index=1, status="kept", reason="SDPA is 1.3x faster at this shape", path="decoder.attn", became="SDPA")
REFUSED = Site(index=2, status="refused", reason="softmax over an axis that is not contracted", path="router")
REPORT = Report(
    sites=(FUSED, KEPT, REFUSED), graph_before="before", graph_after="after", notes=("no C++ compiler found",),
    versions={"torch": "2.13.0"},
)  # fmt: skip


def test_counts() -> None:
    assert (REPORT.fused, REPORT.kept, REPORT.refused) == (1, 1, 1)
    assert REPORT.summary == "3 sites: 1 fused, 1 kept, 1 refused"
    assert Report().summary == "no attention found"


@pytest.mark.parametrize("status", ["kept", "refused"])
def test_a_site_left_alone_has_a_reason(status: str) -> None:
    with pytest.raises(ValueError, match=f"{status} without a reason"):
        Site(index=0, status=status)  # pyright: ignore[reportArgumentType]


def test_an_unknown_status_is_an_error() -> None:
    with pytest.raises(ValueError, match="fused, kept, refused"):
        Site(index=0, status="lost")  # pyright: ignore[reportArgumentType]


def test_to_dict_is_json() -> None:
    read = json.loads(json.dumps(REPORT.to_dict()))
    assert read["sites"][0]["shapes"] == {"q": [2, 12, "n", 64], "k": [2, 12, "m", 64], "v": [2, 12, "n", 64]}
    assert [site["status"] for site in read["sites"]] == ["fused", "kept", "refused"]
    assert read["sites"][1]["reason"] == KEPT.reason
    assert (read["fused"], read["kept"], read["refused"]) == (1, 1, 1)
    assert read["notes"] == ["no C++ compiler found"]
    assert read["versions"] == {"torch": "2.13.0"}
    assert (read["graph_before"], read["graph_after"]) == ("before", "after")
    assert read["kernels"] == {read["sites"][0]["kernel"]: "void f();"} and read["sites"][1]["kernel"] is None
    assert read["schema"] == "attncc-report/1"


def test_table_says_everything_about_each_site() -> None:
    text = str(REPORT)
    for part in (
        "encoder.layer.0.attention.self", "modeling_bert.py:141", "softmax_j(s / 8)", "mask load(m, [b, 0, i, j])",
        "q, v (2, 12, n, 64) k (2, 12, m, 64)", "C++ avx512 kernel", "1.50 times as fast",
        "100, 50% computed, 25% visible", "at most 4 times as fast by leaving scores out",
        "SDPA is 1.3x faster", "router", "not contracted", "3 sites: 1 fused, 1 kept, 1 refused",
        "note: no C++ compiler found",
    ):  # fmt: skip
        assert part in " ".join(text.replace("│", " ").split()), part


def test_times_stand_for_the_sentence_that_says_them_again() -> None:
    timed = replace(FUSED, reason="1.5 times as fast: ...", code="faster", timings={"SDPA": 1500.0, "attncc": 1000.0})
    text = " ".join(str(Report(sites=(timed,))).split())
    assert "measured attncc 1.00 ms, SDPA 1.50 ms: 1.50 times as fast as the best alternative" in text
    assert "why" not in text
    assert "why SDPA is 1.3x faster" in " ".join(str(Report(sites=(KEPT,))).split())


def test_a_report_is_read_at_eighty_columns() -> None:
    long = replace(FUSED, mask="attention_mask[b0, j] != 0 and j <= i" * 8, picture="█" * 48 + "\n", path="a." * 80)
    stream = StringIO()
    Console(file=stream, width=80).print(Report(sites=(long, KEPT, REFUSED), notes=("x" * 200,)))
    assert max(map(len, stream.getvalue().splitlines())) <= 80


def test_representations_are_short() -> None:
    big = replace(FUSED, kernel="x" * 90_000, ir="y" * 1000)
    assert repr(big) == "<site 0, fused, encoder.layer.0.attention.self: softmax_j(s / 8)>"
    assert repr(Report(sites=(big,))) == "<attncc report, 1 site: 1 fused, 0 kept, 0 refused>"


def test_brackets_are_not_markup() -> None:
    assert "[b]h[/b]" in str(Report(sites=(replace(FUSED, equation="[b]h[/b]"),), notes=("[red]",)))


def test_layers_share_a_row() -> None:
    layers = tuple(
        replace(FUSED, index=n, path=f"layer.{n}.attn", speedup=1 + n / 4, kernel=f"// {n}") for n in range(3)
    )
    other = replace(FUSED, index=3, path="layer.3.attn", mask="i >= j")
    assert alike((*layers, other)) == [layers, (other,)]
    text = str(Report(sites=(*layers, other)))
    assert "layer.{0-2}.attn" in text
    assert "1.00 to 1.50 times" in text
    assert "layer.3.attn" in text


def test_sites_in_other_places_do_not_share_a_row() -> None:
    sites = (FUSED, replace(FUSED, index=1, path="decoder.layer.0.attention"), replace(FUSED, index=2, where="x.py:9"))
    assert alike(sites) == [(site,) for site in sites]


def test_ranges() -> None:
    assert ranges([5, 0, 1, 2]) == "0-2,5"
    assert merged_path(["a.0.b.1", "a.1.b.1"]) == "a.{0-1}.b.1"
    assert merged_path(["a.7.b"]) == "a.7.b"


def test_kernels_are_distinct() -> None:
    sites = (FUSED, replace(FUSED, index=1), replace(FUSED, index=2, kernel="void g();"), KEPT)
    assert Report(sites=sites).kernels == ("void f();", "void g();")


def test_planned_layers_share_a_row_and_the_range_of_their_errors() -> None:
    told = "as the plan says: window{{size=4}} on heads 0-1 (50% of the keys, error {}); 0.73 ms, exact 1.16 ms"
    rest = HeadForm("exact", (2,), 1.0, 0.0)
    sites = tuple(
        Site(n, "fused", told.format(error), f"layers.{n}.attn", code="planned",
             forms=(HeadForm("window{size=4}", (0, 1), 0.5, error), rest))
        for n, error in enumerate((8.9e-5, 5.9e-5))
    )  # fmt: skip
    text = " ".join(str(Report(sites)).split())
    assert "sites 0-1: fused" in text and "layers.{0-1}.attn" in text
    assert "window{size=4} on heads 0-1 (50% of the keys, error 5.9e-05 to 8.9e-05); exact on heads 2" in text
    assert "as the plan says: 0.73 ms, exact 1.16 ms [planned]" in text and text.count("as the plan says") == 1
