"""Pictures of masks: the classes of their cells, and the file that holds them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
import torch
from masks.bounds import attention, tiled, visible
from typer.testing import CliRunner, Result

from attncc.cli import inspect
from attncc.cli.app import app
from attncc.ir import parse_attention, print_attention
from attncc.passes.bounds.mask_cells import PARTIAL, SKIPPED, VISIBLE, WASTED, mask_cells
from attncc.report.mask_image import PALETTE, mask_image, png
from attncc.report.model import Report
from attncc.report.site import Site


def pixels_of(data: bytes) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    """The indices and the palette of a PNG without filters; fails where a checksum does."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at < len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        body = data[at + 4 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(body)
        chunks[body[:4]] = body[4:]
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    width, height, *kind = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert kind == [8, 3, 0, 0, 0]
    rows = torch.frombuffer(bytearray(zlib.decompress(chunks[b"IDAT"])), dtype=torch.uint8).view(height, width + 1)
    assert not rows[:, 0].any()
    colours = chunks[b"PLTE"]
    return rows[:, 1:], [tuple(colours[n : n + 3]) for n in range(0, len(colours), 3)]


@pytest.mark.parametrize("mask", ["j <= i", "j <= i and i - j < 40", "abs(i - j) <= 20 or j < 5", "i // 50 == j // 50",
                                  "j % 4 == 1 and j <= i"])  # fmt: skip
def test_cells_of_single_pairs_are_exact(mask: str) -> None:
    sizes = (1, 150, 170, 0)
    a = attention(mask)
    cells = mask_cells(a, sizes)
    seen = visible(a, sizes, {})[0, 0]
    assert torch.equal(cells == VISIBLE, seen)
    needed = tiled(seen[None], 64, "any")[0].repeat_interleave(64, 0)[:150]
    assert torch.equal(cells != SKIPPED, needed)  # the loop visits no more than tiles of 64 rows must
    assert not (cells == PARTIAL).any()


def test_coarse_cells() -> None:
    causal = mask_cells(attention("j <= i"), (1, 4096, 4096, 0), 32)
    at = torch.arange(32)
    assert (causal[at[:, None] > at] == VISIBLE).all()
    assert (causal.diagonal() == PARTIAL).all()
    assert (causal[at[:, None] < at] == SKIPPED).all()  # cells are 128 rows high, two tiles: none reaches beyond
    window = mask_cells(attention("j <= i and i - j < 1000"), (1, 4096, 4096, 0), 32)
    apart = at[:, None] - at
    assert (window[(apart < 0) | (apart > 8)] == SKIPPED).all()
    assert (window[(apart > 0) & (apart < 7)] == VISIBLE).all()
    assert (window[apart == 0] == PARTIAL).all()


def test_what_reads_data_is_drawn_as_if_all_were_allowed() -> None:
    a = attention("pad[b, j] and j <= i")
    assert torch.equal(mask_cells(a, (1, 64, 64, 0)), mask_cells(attention("j <= i"), (1, 64, 64, 0)))
    pad = torch.ones(1, 64, dtype=torch.bool)
    pad[0, 10:] = False
    assert set(mask_cells(a, (1, 64, 64, 0), tensors={"pad": pad})[63].tolist()) == {VISIBLE, WASTED}


def test_long_masks_make_nothing_square() -> None:
    n = 1 << 20  # a bit a pair would take 137 GB
    cells = mask_cells(attention("j <= i and i - j < 65536"), (1, n, n, 0), 64)
    assert (cells != SKIPPED).sum(1).tolist() == [min(i + 1, 5) for i in range(64)]


def test_the_file_holds_the_cells() -> None:
    a = attention("j <= i and i - j < 40")
    text = print_attention(a)
    site = Site(0, "fused", ir=text, sizes=(1, 150, 170, 0), picture="#")
    pixels, palette = pixels_of(mask_image(site))
    assert palette == list(PALETTE)
    assert torch.equal(pixels[::4, ::4], mask_cells(parse_attention(text), (1, 150, 170, 0)))
    assert pixels.shape == (600, 680)


def test_the_command_writes_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = ("j <= i", "j <= i and i - j < 40")
    sites = [Site(n, "kept", "slower", ir=print_attention(attention(m)), sizes=(1, 70, 70, 0), picture="#")
             for n, m in enumerate(masks)]  # fmt: skip
    report = Report((*sites, Site(2, "refused", "no product")))
    monkeypatch.setattr(inspect, "load", lambda target: None)
    monkeypatch.setattr(inspect, "examine", lambda target, plan=None: report)

    def run(*args: str) -> Result:
        return CliRunner().invoke(app, ["inspect", "x:y", "--picture", *args])

    assert run(str(tmp_path / "all")).exit_code == 0
    assert sorted(x.name for x in (tmp_path / "all").iterdir()) == ["site-0.png", "site-1.png"]
    one = run(str(tmp_path / "one.png"), "--mask", "1")
    assert one.exit_code == 0 and "one.png: dark blue visible" in one.stdout
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "all" / "site-1.png").read_bytes() == mask_image(sites[1])
    for args, why in (((str(tmp_path / "x.png"),), "2 sites have masks"),
                      ((str(tmp_path), "--mask", "2"), "no picture"),
                      ((str(tmp_path / "one.png" / "x"),), "one.png")):  # fmt: skip
        failed = run(*args)
        assert failed.exit_code == 2 and why in failed.stderr and "Traceback" not in failed.stderr


def test_one_pixel() -> None:
    pixels, _ = pixels_of(png(torch.tensor([[2]], dtype=torch.uint8)))
    assert pixels.tolist() == [[2]]
