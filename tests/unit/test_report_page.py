"""The page of a report: complete in itself, sound as HTML, safe whatever a model calls its parts, and small."""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from attncc.report.drawing import drawing
from attncc.report.model import Report
from attncc.report.page import MOST_SOURCE, PageError, page
from attncc.report.site import GraphNode, HeadForm, Site

IR = """attention
axis   i = 256, j = 256, d = 64, e = 64
tensor q: f32[256, 64]
tensor k: f32[256, 64]
tensor v: f32[256, 64]
q      q[i, d]
k      k[j, d]
v      v[j, e]
score  s
mask   j <= i
norm   softmax
empty  zero
weight w
give   out
dtype  f32
layout i, e
"""
GRAPH = (GraphNode("q", "", (), "given"), GraphNode("scores", "matmul", (0,), "own"),
         GraphNode("out", "matmul", (0, 1), "site"), GraphNode("y", "view", (2,), "user"))  # fmt: skip
SITE = Site(
    0, "fused", "faster", "layers.0.attn", "model.py:3", "softmax(s) v", "j <= i", {"q": (256, 64)}, 32896, 40960,
    65536, "C++ avx512 kernel", 1.5, ir=IR, kernel="void f();\n" * 10, language="cpp", picture="█", sizes=(),
    code="faster",
    timings={"attncc": 100.0, "SDPA": 150.0}, isa="avx512",
    forms=(HeadForm("streaming{sinks=4}", (0, 1), 0.5, 1e-3),),
    stages=(("lifting", IR), ("drop-rounding", IR), ("fold-predicates", IR.replace("j <= i", "i >= j"))),
    graph=GRAPH, fused_graph=(GraphNode("out", "attncc.attention", (), "site"),),
)  # fmt: skip
REFUSED = Site(1, "refused", "the axis is not contracted", "router", code="not-contracted")
REPORT = Report((SITE, REFUSED), notes=("no compiler",), versions={"attncc": "0.1.0"}, machine={"threads": 2})
VOID = {"meta", "img", "link", "br", "input"}
SHAPES = {"line", "rect"}


class Page(HTMLParser):
    """Elements with their attributes, and whether each that opens is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()
        assert not self.stack, f"open at the end: {self.stack}"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        assert tag in SHAPES, tag
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & {*self.stack}:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_everything_is_there() -> None:
    shown = " ".join(" ".join(Page(page(REPORT, "my:model")).text).split())
    for part in (
        "my:model", "2 sites: 1 fused, 0 kept, 1 refused", "no compiler", "layers", "site 0", "router", "model.py:3",
        "65,536, 62% computed, 50% visible", "attncc (chosen) 100.0 us", "SDPA 150.0 us", "streaming{sinks=4}", "0-1",
        "visible: 50%", "computed in vain: 12%", "skipped: 38%", "Graph before", "Graph after", "mask j <= i",
        "drop-rounding Changed nothing.", "mask i >= j", "the axis is not contracted [not-contracted]", "void f();",
    ):  # fmt: skip
        assert part in shown, part


def test_it_asks_for_nothing_and_leads_nowhere_else() -> None:
    read = Page(page(REPORT))
    for tag, attributes in read.elements:
        assert tag not in ("link", "iframe", "object", "form")
        assert not any(name.startswith("on") for name in attributes), attributes
        for name in ("src", "href", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), attributes
    ids = Counter(a["id"] for _, a in read.elements if "id" in a)
    assert not [name for name, count in ids.items() if count > 1]
    leads = {a["href"][1:] for a in read.all("a")}
    leads |= {a["aria-labelledby"] for _, a in read.elements if "aria-labelledby" in a}
    assert leads <= set(ids)
    assert "url(" not in page(REPORT) and "@import" not in page(REPORT)


def test_it_is_readable_without_eyes_and_mouse() -> None:
    read = Page(page(REPORT))
    assert read.all("html") == [{"lang": "en"}]
    assert all(a.get("alt") for a in read.all("img")) and all(a.get("aria-label") for a in read.all("svg"))
    scrolled = [a for _, a in read.elements if a.get("class") == "scroll"] + read.all("pre")
    assert scrolled and all(a.get("tabindex") == "0" and a.get("aria-label") for a in scrolled)
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in pairwise(levels))
    assert all(a.get("scope") for a in read.all("th"))


EVIL = "</script><img src=x onerror=alert(1)>'\"&{{ 7 * 7 }}{% raw %}]]>\u202e"


def evil() -> Report:
    """Every text that a model has a say in."""
    nodes = (GraphNode(EVIL, EVIL, (), "given"), GraphNode(EVIL, EVIL, (0,), "site"))
    site = replace(
        SITE, reason=EVIL, path=EVIL, where=EVIL, equation=EVIL, mask=EVIL, shapes={EVIL: (EVIL,)}, became=EVIL,
        kernel=EVIL, code=EVIL, names={EVIL: EVIL}, timings={EVIL: 1.0, "attncc": 2.0}, graph=nodes,
        stages=((EVIL, EVIL),), forms=(HeadForm(EVIL, (0,), 1.0, 0.0),),
    )  # fmt: skip
    refused = replace(REFUSED, path=EVIL, reason=EVIL)
    return Report((site, refused), notes=(EVIL,), versions={EVIL: EVIL}, machine={EVIL: EVIL})


def test_names_of_a_model_stay_text() -> None:
    before, after = Page(page(REPORT)), Page(page(evil(), EVIL))
    kinds = {tag for tag, _ in before.elements}
    assert {tag for tag, _ in after.elements} <= kinds
    assert len(after.all("img")) == len(before.all("img")) == 1 and len(after.all("script")) == 1
    assert not any(name.startswith("on") for _, a in after.elements for name in a)
    assert sum(EVIL in text for text in after.text) > 15, "and are shown as they are"
    assert "49" not in after.all("title") and "{{ 7 * 7 }}" in " ".join(after.text)


@pytest.mark.full
def test_thirty_two_layers_are_under_two_megabytes() -> None:
    """Of different kernels too, the sources of which are then left out at some point."""
    layers = tuple(replace(SITE, index=n, path=f"layers.{n}.attn", kernel="x" * 92_000) for n in range(32))
    noise = torch.randint(0, 4, (256, 256), generator=torch.Generator().manual_seed(0))
    apart = tuple(
        replace(s, kernel=f"{s.index} " * 40_000, mask=f"j <= i + {s.index}", cells=noise) for s in layers
    )
    assert len(page(Report(layers))) < 250_000
    large = page(Report(apart))
    assert len(large.encode()) < 2_000_000
    assert large.count("Left out, for the page to stay small") >= 32 - MOST_SOURCE // 80_000


def test_a_report_of_nothing() -> None:
    read = Page(page(Report()))
    assert "no attention found" in read.text and not read.all("article")


def test_a_drawing_has_every_node_below_its_inputs() -> None:
    drawn = drawing(GRAPH)
    assert drawn is not None and drawing(()) is None
    q, scores, out, y = drawn.boxes
    assert q.y < scores.y < out.y < y.y and len(drawn.lines) == 4
    assert all(b.x >= 0 and b.x + b.width <= drawn.width and b.y + b.height <= drawn.height for b in drawn.boxes)
    assert drawn.text == "scores = matmul(q); out = matmul(q, scores); y = view(out)"


def test_notebooks_show_the_page_in_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = REPORT._repr_html_()
    assert shown is not None
    (frame,) = Page(shown).all("iframe")
    assert frame["sandbox"] == "allow-scripts" and Page(frame["srcdoc"]).all("article")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert REPORT._repr_html_() is None
    with pytest.raises(PageError, match=r"attncc\[report\]"):
        REPORT.html()


CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page was not opened in a browser")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(scheme: Any, tmp_path: Path) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright here: the page was not opened in a browser")
    files = {"page": REPORT, "evil": evil()}
    for name, each in files.items():
        (tmp_path / f"{name}.html").write_text(page(each, EVIL if name == "evil" else name), encoding="utf-8")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            view = browser.new_page(color_scheme=scheme, viewport={"width": 420, "height": 800})
            said: list[str] = []
            asked: list[str] = []
            view.on("console", lambda message: said.append(message.text))
            view.on("pageerror", lambda error: said.append(str(error)))
            view.on("dialog", lambda dialog: said.append("dialog"))
            view.on("request", lambda request: asked.append(request.url))
            view.goto((tmp_path / "evil.html").as_uri())
            view.goto((tmp_path / "page.html").as_uri())
            assert not said and all(u.startswith(("file:", "data:")) for u in asked)
            colour = view.evaluate("getComputedStyle(document.body).backgroundColor")
            assert colour == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
            assert view.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no scrolling sideways"
            _by_keyboard(view)
        finally:
            browser.close()


def _by_keyboard(view: Any) -> None:
    image = view.locator("figure.mask img")
    first = image.bounding_box()["width"]
    view.locator("figure.mask .scroll").focus()
    view.keyboard.press("+")
    assert image.bounding_box()["width"] == pytest.approx(2 * first, rel=0.01)
    view.keyboard.press("0")
    assert image.bounding_box()["width"] == pytest.approx(first, rel=0.01)
    source = view.locator("#kernel-1")
    assert source.get_attribute("open") is None
    view.get_by_role("link", name="Source of the kernel").focus()
    view.keyboard.press("Enter")
    view.locator("#kernel-1[open]").wait_for()  # a function to wait for would be eval, which the page forbids
    view.evaluate("window.scrollTo(0, 0); document.activeElement.blur()")
    view.keyboard.press("Home")
    assert view.get_by_role("region", name="Mask of site 0").count() == 1
