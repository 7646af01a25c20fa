"""The README's example is the file in examples/, and prints what the README says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def machine_independent(output: str) -> list[str]:
    """The lines without the size of the rounding error, and without what was measured and what came of it."""
    found: list[str] = []
    skipping = False
    for line in output.splitlines():
        skipping = line.startswith(("runs ", "measured ", "why ")) or (skipping and line.startswith(" "))
        line = re.sub(r"\d\.\d+e-0[67]", "TINY", line)
        line = re.sub(r"\d fused, \d kept", "SETTLED", line)
        line = re.sub(r"^(site \d): (fused|kept) ─+$", r"\1: SETTLED", line)
        line = re.sub(r"\d+% computed, ", "", re.sub("[░▒▓█]", "", line))
        found += [] if skipping else [" ".join(line.split())]
    # where a sentence is folded depends on what is in it
    return " ".join(found).replace("─", "").split("  ")


def test_the_example_is_the_file() -> None:
    assert (ROOT / "examples" / "ten_lines.py").read_text(encoding="utf-8") in blocks("python")


def test_the_example_prints_what_the_readme_says() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "examples/ten_lines.py"], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    (shown,) = (block for block in blocks("text") if block.startswith("largest difference"))
    assert machine_independent(done.stdout)[0].startswith("largest difference: TINY site 0: SETTLED (top level)")
    assert machine_independent(done.stdout)[-1] == "1 site: SETTLED, 0 refused"
    assert machine_independent(done.stdout) == machine_independent(shown)


def test_what_the_readme_points_at_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []
    for module, factory in re.findall(r"inspect (examples\.\w+):(\w+)", text):
        source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        assert f"def {factory}(" in source


@pytest.mark.full
@pytest.mark.parametrize(
    ("example", "says"),
    [("generate", "the same tokens as eager: True"), ("diffusion", "largest difference to eager: "),
     ("training", "step 3: loss "), ("deployment", "serving: first call ")],
)  # fmt: skip
def test_examples_run_as_they_are(example: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", f"examples/{example}.py"], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


@pytest.mark.full
def test_the_gallery_is_what_its_example_prints() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "examples/gallery.py"], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
