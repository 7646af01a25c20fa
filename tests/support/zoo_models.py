"""The zoo: real model classes and hand-written forms, all tiny, all random."""

from __future__ import annotations

from zoo_case import Case
from zoo_diffusion import DIFFUSION
from zoo_forms import FORMS
from zoo_others import OTHERS
from zoo_spellings import SPELLINGS
from zoo_text import TEXT
from zoo_vision import VISION

CASES: tuple[Case, ...] = (*SPELLINGS, *FORMS, *OTHERS, *TEXT, *VISION, *DIFFUSION)

assert len({case.name for case in CASES}) == len(CASES)
