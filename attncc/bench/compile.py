"""`attncc bench --suite compile`: what share of the first call of a compiled model is attncc's own work.

Own work is reading the graph, finding attention and editing the graph; building kernels and measuring them are apart.
Each model is compiled in a process of its own with empty caches, Inductor's included, and called once. Widths are
realistic, inputs short: the time to compile does not depend on them. The models are those of transformers.

Times are the processor's, of that process alone, which what else the machine does hardly changes. The first call is
given by the clock too, with the C++ compilers that Inductor waits for: the share is of that, which a user waits.

A first call begins with `torch.compile`, which imports Inductor where that is asked for by its name; other backends
import it in the call. A warm start is the same first call in a later process, which finds everything in the caches,
beside that of Inductor's own backend with its caches full: the call, and the whole process from its begin, imports and
the model included.
"""

from __future__ import annotations

import importlib
import json as json_format
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from attncc.bench.chosen import chosen
from attncc.progress import listening

#: Steps of the driver that are own work; what else it reports while it decides is building and measuring.
OWN = ("reading the graph", "finding attention", "editing the graph")
REST = "compiling the rest with Inductor"
MODELS = ("llama", "bert", "gpt2", "vit", "t5", "gemma3", "swin")
_WIDTH, _HEADS, _TOKENS = 512, 8, 96
#: Warm starts with each backend, by turns.
_WARM_STARTS = 3


def run(quick: bool = False, json: Path | None = None, *, only: str = "") -> dict[str, Any]:
    """Measure the rows whose names hold one of the words of `only` (by commas), print them, and write `json` (other
    rows that it holds stay)."""
    names = chosen(cases((4,) if quick else (8, 32, 64)), only)
    rows: dict[str, Any] = json_format.loads(json.read_text())["rows"] if json is not None and json.exists() else {}
    for name in names:
        rows[name] = _apart(name)
        print(line(name, rows[name]), flush=True)
        if json is not None:
            json.write_text(json_format.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    report = {"torch": torch.__version__, "rows": rows}
    print(table(report))
    return report


def cases(depths: tuple[int, ...]) -> list[str]:
    """Names of rows: model, layers, spelling, shapes. T5 has one spelling."""
    return [f"{model} {n} {spelling} {shapes}" for n in depths for model in MODELS
            for spelling in ("eager", "sdpa") for shapes in ("static", "dynamic")
            if spelling == "eager" or model != "t5"]  # fmt: skip


def _apart(name: str) -> dict[str, Any]:
    """The row of a case, measured in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        row = _process(folder, name)
        if "failed" in row:
            return row
        _process(folder, name, "inductor")
        starts = [(_process(folder, name), _process(folder, name, "inductor")) for _ in range(_WARM_STARTS)]
    if any("failed" in x for pair in starts for x in pair):
        return row
    for at, backend in enumerate(("attncc", "inductor")):
        for what, key in (("first call", "warm"), ("process", "warm process")):
            row.setdefault(key, {})[backend] = statistics.median(pair[at][what] for pair in starts)
    return row


def _process(folder: str, name: str, backend: str = "attncc") -> dict[str, Any]:
    """What a new process measures, with caches in `folder`."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "ATTNCC_CACHE_DIR": f"{folder}/attncc",
              # a package that is installed has its bytecode beside it, a checkout may not
              "PYTHONPYCACHEPREFIX": f"{folder}/bytecode", "PYTHONDONTWRITEBYTECODE": ""}  # fmt: skip
    command = [sys.executable, "-m", "attncc.bench.compile", name, backend]
    done = subprocess.run(command, env={**os.environ, **caches}, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1][:200]}
    return json_format.loads(done.stdout.splitlines()[-1])


def measured(name: str, backend: str = "attncc") -> dict[str, Any]:
    """Seconds of the first call, of each step of attncc's own, and of building and measuring, in this process; and how
    long the first call took by the clock on the wall."""
    model_name, layers, spelling, shapes = name.split()
    model, args, kwargs = _model(model_name, int(layers), spelling)
    clock, start = _Clock(), time.perf_counter()
    compiled = torch.compile(model.eval(), backend=backend, dynamic=shapes == "dynamic")
    with torch.no_grad(), listening(clock.step):
        compiled(*args, **kwargs)
    clock.step("")
    own = {text: clock.seconds[text] for text in OWN}
    others = sum(s for text, s in clock.seconds.items() if text not in (*OWN, REST, "before"))
    return {"first call": sum(clock.seconds.values()), "own": own, "kernels and measuring": others,
            "wall": time.perf_counter() - start, "process": time.process_time()}  # fmt: skip


class _Clock:
    """How long each step took, by what was reported at its start."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._now, self._since = "before", time.process_time()

    def step(self, text: str) -> None:
        now = time.process_time()
        self.seconds[self._now] += now - self._since
        self._now, self._since = text, now


def _model(name: str, layers: int, spelling: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A model with random weights, and what it is called with."""
    library: Any = importlib.import_module("transformers")  # takes seconds
    torch.manual_seed(0)
    ids = torch.randint(1, 500, (2, _TOKENS))
    image = torch.randn(2, 3, 224, 224)
    text: dict[str, Any] = {"hidden_size": _WIDTH, "num_hidden_layers": layers, "num_attention_heads": _HEADS,
                            "intermediate_size": 2 * _WIDTH, "attn_implementation": spelling}  # fmt: skip
    causal = {**text, "num_key_value_heads": _HEADS // 2, "vocab_size": 512}
    if name == "llama":
        return library.LlamaModel(library.LlamaConfig(**causal)), (ids,), {"use_cache": False}
    if name == "gemma3":
        config = library.Gemma3TextConfig(**causal, head_dim=_WIDTH // _HEADS, sliding_window=32)
        return library.Gemma3TextModel(config), (ids,), {"use_cache": False}
    if name == "bert":
        return library.BertModel(library.BertConfig(**text, vocab_size=512)), (ids,), {"attention_mask": ids > 9}
    if name == "gpt2":
        config = library.GPT2Config(n_embd=_WIDTH, n_layer=layers, n_head=_HEADS, vocab_size=512, bos_token_id=1,
                                    eos_token_id=1, attn_implementation=spelling)  # fmt: skip
        return library.GPT2Model(config), (ids,), {"use_cache": False}
    if name == "t5":
        config = library.T5Config(d_model=_WIDTH, num_layers=layers, num_heads=_HEADS, d_ff=2 * _WIDTH, vocab_size=512)
        return library.T5EncoderModel(config), (ids,), {}
    if name == "vit":
        return library.ViTModel(library.ViTConfig(**text)), (image,), {}
    depths, heads = ([2, 2, layers - 6, 2], [4, 8, 16, 32]) if layers > 6 else ([2, 2], [4, 8])
    config = library.SwinConfig(embed_dim=128, depths=depths, num_heads=heads, attn_implementation=spelling)
    return library.SwinModel(config), (image,), {}


def line(name: str, row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{name}: failed, {row['failed']}"
    own = sum(row["own"].values())
    parts = ", ".join(f"{text} {s:.2f}" for text, s in row["own"].items())
    text = (f"{name}: {row['wall']:.0f} s by the clock, {row['first call']:.1f} s of the processor, own {own:.2f} s "
            f"({own / row['wall']:.1%}; {parts}), kernels, measuring {row['kernels and measuring']:.1f} s")  # fmt: skip
    return text + (f", warm {_warm(row, 'warm')}, process {_warm(row, 'warm process')}" if "warm" in row else "")


def _warm(row: dict[str, Any], key: str) -> str:
    """Processor seconds of a warm start with attncc and with Inductor alone, and what the first is above the second."""
    if key not in row:
        return ""
    own, other = row[key]["attncc"], row[key]["inductor"]
    return f"{own:.1f} / {other:.1f} ({own / other - 1:+.1%})"


def table(report: dict[str, Any]) -> str:
    """Markdown: one line a row."""
    lines = ["| model | by the clock, s | processor, s | reading | finding | editing | own / clock | own / processor "
             "| warm, attncc / Inductor | whole process |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, row in report["rows"].items():
        if "failed" in row:
            lines.append(f"| {name} | {row['failed']} | | | | | | | | |")
            continue
        own = [row["own"][text] for text in OWN]
        cells = [f"{row['wall']:.0f}", f"{row['first call']:.1f}", *(f"{s:.2f}" for s in own),
                 f"{sum(own) / row['wall']:.1%}", f"{sum(own) / row['first call']:.1%}",
                 _warm(row, "warm"), _warm(row, "warm process")]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(json_format.dumps(measured(*sys.argv[1:])))
