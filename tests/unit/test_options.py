"""Options and modes that there are not are named in one line, with the right ones."""

from __future__ import annotations

import pytest

from attncc.driver.options import Options, options_of


def test_no_options_are_the_defaults() -> None:
    assert options_of(None, None) == options_of("default", {}) == Options(True, True, None, {})


def test_own_options_and_those_of_inductor_are_told_apart() -> None:
    found = options_of("max-autotune-no-cudagraphs", {"measure": False, "epilogue-fusion": True, "max_autotune": False})
    assert found.inductor and not found.measure
    assert found.config["epilogue_fusion"] and found.config["coordinate_descent_tuning"]
    assert options_of(None, {"force_disable_caches": True}).config == {"force_disable_caches": True}  # another name
    assert found.config["max_autotune"] is False  # what is asked for goes before what a mode means


@pytest.mark.parametrize(
    ("mode", "options", "named"),
    [
        (None, {"measur": False}, ("'measur'", "did you mean 'measure'?")),
        (None, {"max_autotun": True}, ("'max_autotun'", "did you mean 'max_autotune'?")),
        (None, {"qqqqqqqq": 1}, ("'qqqqqqqq'", "'inductor', 'measure'")),
        (None, {"measure": "no"}, ("'measure'", "True or False", "'no'")),
        ("max-autotun", None, ("'max-autotun'", "did you mean 'max-autotune'?", "'reduce-overhead'")),
    ],
)
def test_wrong_ones_are_said_in_one_line(mode: str | None, options: dict[str, object], named: tuple[str, ...]) -> None:
    with pytest.raises(RuntimeError) as raised:
        options_of(mode, options)
    message = str(raised.value)
    assert "\n" not in message and message.startswith("attncc: ") and all(name in message for name in named)
