"""Reasons: values with a code, rendered by one table."""

import re
from pathlib import Path
from string import Formatter

import pytest

from attncc.ir.reasons import SENTENCES, Reason, because

ROOT = Path(__file__).parents[2]


def test_a_reason_is_a_value() -> None:
    assert because("scores-layer", "linear") == Reason("scores-layer", ("linear",)) != because("scores-layer", "conv2d")
    assert str(because("scores-chosen", "topk")).endswith("its scores were picked out of others (topk)")


def test_reasons_nest() -> None:
    inner = because("unknown-function", "atan")
    outer = because("no-softmax", inner)
    assert str(outer) == f"attention without a softmax: {inner}"
    assert outer.codes == "no-softmax/unknown-function"


def test_braces_of_arguments_are_text() -> None:
    assert str(because("graph-no-node", "{x}")) == "no node of the captured graph holds {x}"


@pytest.mark.parametrize(
    ("code", "args", "message"),
    [("no-such", (), "no reason has the code 'no-such'"), ("dropout", ("x",), "takes 0 arguments, not 1"),
     ("scores-layer", (), "takes 1 arguments, not 0")],
)  # fmt: skip
def test_what_is_no_reason(code: str, args: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Reason(code, args)


def test_every_sentence_is_given_somewhere_and_every_code_is_known() -> None:
    """By the text of the sources: a code that nobody gives is no reason, and one without a sentence fails when it is
    needed most."""
    folders = (ROOT / "patterns", ROOT / "passes", ROOT / "attncc" / "driver", ROOT / "attncc" / "convert")
    text = "\n".join(f.read_text(encoding="utf-8") for folder in folders for f in sorted(folder.rglob("*.py")))
    given = {code for call in re.findall(r"because\(([^()]*)", text) for code in re.findall(r'"([a-z-]+)"', call)}
    assert set(SENTENCES) <= given
    for call in re.findall(r'because\("([a-z-]+)"', text):
        assert call in SENTENCES


def test_sentences_read_alike() -> None:
    for code, sentence in SENTENCES.items():
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", code)
        assert not sentence.endswith(".") and sentence == sentence.strip()
        assert all(name in ("", None) for _, name, _, _ in Formatter().parse(sentence))
