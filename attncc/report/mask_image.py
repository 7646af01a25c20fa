"""The mask of a site as a PNG: what is visible, and what the kernel's loop visits without need.

The format is W3C's PNG, one palette index a pixel, so that the picture holds the classes themselves."""

from __future__ import annotations

import struct
import zlib

import torch

from attncc.ir import parse_attention
from attncc.passes.bounds.mask_cells import mask_cells
from attncc.report.site import Site

#: By class of `attncc.passes.bounds.mask_cells`: skipped, wasted, partial, visible.
PALETTE = ((255, 255, 255), (244, 178, 102), (134, 171, 214), (31, 78, 140))
LEGEND = "dark blue visible, light blue in part, orange visited in vain, white skipped; rows down, keys to the right"
_SIDE = 768  # pixels, about: cells are as many whole pixels wide as fit


def mask_image(site: Site) -> bytes:
    """The picture of a site whose IR and sizes are known (those with a `picture` of their mask)."""
    cells = cells_of(site)
    scale = max(1, _SIDE // max(cells.shape))
    return png(cells.repeat_interleave(scale, 0).repeat_interleave(scale, 1))


def cells_of(site: Site) -> torch.Tensor:
    """The cells of a site's mask: as a call showed them, or as its IR says, where what data decides is let through."""
    assert site.ir is not None
    return site.cells if site.cells is not None else mask_cells(parse_attention(site.ir), site.sizes or ())


def png(pixels: torch.Tensor) -> bytes:
    """uint8[height, width], indices into PALETTE, as a PNG file."""
    height, width = pixels.shape
    rows = b"".join(b"\0" + bytes(row.tolist()) for row in pixels)  # filter 0: as they are
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits an index, a palette
    palette = b"".join(bytes(colour) for colour in PALETTE)
    parts = [(b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in parts)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
