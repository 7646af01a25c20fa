"""What `attncc bench --suite gpu` measures: attentions as IR text and as their rivals spell them."""

from __future__ import annotations

import torch

from attncc.bench.row import Mod, Row


def _causal_mod(extra: dict[str, torch.Tensor]) -> Mod:
    return lambda b, h, i, j: j <= i


def causal(n: int, d: int, group: int = 1) -> Row:
    heads = 8 if group > 1 else 2048 // d
    name = f"causal {n} D{d}" + (f" GQA {heads * group}/{heads}" if group > 1 else "")
    return Row(name, max(1, 16384 // n), heads, group, n, n, d, "j <= i", mask_mod=_causal_mod, causal=True)


def window(n: int, width: int) -> Row:
    def mod(extra: dict[str, torch.Tensor]) -> Mod:
        return lambda b, h, i, j: (j <= i) & (i - j < width)

    return Row(f"window {width} of {n}", 1, 16, 1, n, n, 128, f"j <= i and i - j < {width}", mask_mod=mod)


def documents(n: int, count: int) -> Row:
    """Packed sequences of unequal lengths, each causal."""

    def extra(device: torch.device) -> dict[str, torch.Tensor]:
        ends = torch.rand(count - 1, generator=torch.Generator().manual_seed(1)).mul(n).long().sort().values
        return {"doc": torch.bucketize(torch.arange(n), ends, right=True).int().to(device)}

    def mod(extra: dict[str, torch.Tensor]) -> Mod:
        doc = extra["doc"]
        return lambda b, h, i, j: (j <= i) & (doc[i] == doc[j])

    mask = "j <= i and doc[i] == doc[j]"
    return Row(f"{count} documents in {n}", 1, 16, 1, n, n, 128, mask, declared=(f"doc: i32[{n}]",), extra=extra,
               mask_mod=mod)  # fmt: skip


def prefix_lm(n: int, prefix: int) -> Row:
    def mod(extra: dict[str, torch.Tensor]) -> Mod:
        return lambda b, h, i, j: (j <= i) | (j < prefix)

    return Row(f"prefix {prefix} of {n}", 1, 16, 1, n, n, 128, f"j <= i or j < {prefix}", mask_mod=mod)


def t5_bias(n: int) -> Row:
    def extra(device: torch.device) -> dict[str, torch.Tensor]:
        return {"table": torch.randn(257, 16, device=device, dtype=torch.bfloat16)}

    def mod(extra: dict[str, torch.Tensor]) -> Mod:
        table = extra["table"]
        return lambda s, b, h, i, j: s + table[torch.clamp(j - i, -128, 128) + 128, h]

    score = "s * SCALE + table[min(max(j - i, -128), 128) + 128, HEAD]"
    return Row(f"T5 bias {n}", 4, 16, 1, n, n, 64, score=score, declared=("table: bf16[257, 16]",), extra=extra,
               score_mod=mod)  # fmt: skip


def soft_cap(n: int) -> Row:
    def mod(extra: dict[str, torch.Tensor]) -> Mod:
        return lambda s, b, h, i, j: torch.tanh(s / 50.0) * 50.0

    return Row(f"soft cap {n}", 1, 16, 1, n, n, 128, "j <= i", score="tanh(s * SCALE / 50.0) * 50.0",
               mask_mod=_causal_mod, score_mod=mod)  # fmt: skip


def neighbourhood(shape: tuple[int, ...], reach: int) -> Row:
    """Keys at most `reach` away in every direction; tokens in raster order."""
    n, steps = 1, list[tuple[int, int]]()
    for size in reversed(shape):
        steps.append((n, size))
        n *= size
    terms = [f"abs(i // {s} % {size} - j // {s} % {size}) <= {reach}" for s, size in steps]

    def mod(extra: dict[str, torch.Tensor]) -> Mod:
        def near(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            seen = [(i // s % size - j // s % size).abs() <= reach for s, size in steps]
            result = seen[0]
            for x in seen[1:]:
                result = result & x
            return result

        return near

    name = f"neighbourhood {'x'.join(map(str, shape))} within {reach}"
    return Row(name, 1, 16, 1, n, n, 64, " and ".join(terms), mask_mod=mod)


def block_table(n: int, block: int, seen: float) -> Row:
    """Each head sees its own blocks of keys before the diagonal, `seen` of them, and those on it."""
    count = n // block

    def extra(device: torch.device) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(2)
        table = torch.rand(16, count, count, generator=random) < seen
        return {"blocks": (table | torch.eye(count, dtype=torch.bool)).to(device)}

    def mod(extra: dict[str, torch.Tensor]) -> Mod:
        blocks = extra["blocks"]
        return lambda b, h, i, j: (j <= i) & blocks[h, i // block, j // block]

    mask = f"j <= i and blocks[HEAD, i // {block}, j // {block}]"
    return Row(f"blocks of {block} in {n}, {seen:.0%} seen", 1, 16, 1, n, n, 128, mask,
               declared=(f"blocks: bool[16, {count}, {count}]",), extra=extra, mask_mod=mod, by_head=True)  # fmt: skip


def strided(n: int, block: int, local: int, period: int) -> Row:
    """S2 attention: `local` blocks before each row, and of the others every `period`-th, another one for each head."""

    def mod(extra: dict[str, torch.Tensor]) -> Mod:
        return lambda b, h, i, j: (j <= i) & (
            (i // block - j // block < local) | ((j // block + h) % period == 0)
        )

    mask = f"j <= i and (i // {block} - j // {block} < {local} or (j // {block} + HEAD) % {period} == 0)"
    return Row(f"S2 {local} blocks of {block} and 1 of {period} in {n}", 1, 16, 1, n, n, 128, mask, mask_mod=mod,
               by_head=True)  # fmt: skip


def decode(keys: int, batch: int) -> Row:
    """One new token a sequence, caches filled to unequal lengths."""

    def extra(device: torch.device) -> dict[str, torch.Tensor]:
        return {"length": (keys - torch.arange(batch) * (keys // (2 * batch))).int().to(device)}

    def mod(extra: dict[str, torch.Tensor]) -> Mod:
        length = extra["length"]
        return lambda b, h, i, j: j < length[b]

    return Row(f"decode {keys} batch {batch} GQA 32/8", batch, 8, 4, 1, keys, 128, "j < length[b]",
               declared=(f"length: i32[{batch}]",), extra=extra, mask_mod=mod)  # fmt: skip


def rows(*, quick: bool) -> list[Row]:
    if quick:
        return [causal(4096, 64), causal(4096, 128), causal(4096, 128, 4), window(8192, 1024), documents(8192, 8),
                t5_bias(2048), soft_cap(4096), neighbourhood((64, 64), 6), block_table(8192, 64, 0.1),
                strided(16384, 64, 4, 16), decode(16384, 1), decode(16384, 16)]
    return [
        *(causal(n, d) for d in (64, 128) for n in (1024, 4096, 16384, 65536)),
        *(causal(n, 128, 4) for n in (4096, 16384)),
        window(16384, 1024), window(65536, 1024), documents(16384, 8), documents(65536, 64), prefix_lm(16384, 4096),
        t5_bias(4096), soft_cap(4096), soft_cap(16384), neighbourhood((64, 64), 6), neighbourhood((16, 16, 16), 3),
        block_table(16384, 64, 0.1), block_table(65536, 128, 0.05), strided(16384, 64, 4, 16),
        strided(65536, 64, 16, 16),
        *(decode(m, b) for m in (16384, 65536, 131072) for b in (1, 8, 64)),
    ]  # fmt: skip
