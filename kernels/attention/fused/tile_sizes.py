"""Tile sizes by kernel, architecture, head size, dtype and causality, from `tile_sizes.json`.

`bench/speed/attention_tiles.py` writes that file, and its `source` says whether its sizes were measured.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("tile_sizes.json")
KERNELS = ("forward", "backward_query", "backward_key", "backward_key_adding_dq")
# By compute capability, whose sizes to take. Consumer GPUs (8.6, 8.9, 12.x), and any not listed, have 99 KiB of shared
# memory and the tensor core instructions of 8.0.
ARCHITECTURES = {80: 80, 86: 86, 87: 80, 88: 86, 89: 86, 90: 90, 100: 100, 103: 100, 110: 100, 120: 86, 121: 86}
HEAD_SIZES = (64, 128, 256)


@dataclass(frozen=True)
class TileSize:
    """Query and key rows of a tile, warps of its program, stages of its software pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


SMALL = TileSize(32, 16, 4, 1)  # for the interpreter: short sequences have many tiles


@functools.cache
def tile_size(kernel: str, architecture: int, head_size: int, bits: int, causal: bool) -> TileSize:
    """For `kernel`, one of KERNELS, on an architecture such as 90, a padded head size and the bits of the dtype."""
    listed = ARCHITECTURES.get(architecture, 86)
    bucket = next(size for size in HEAD_SIZES if size >= head_size)
    return _table()[kernel, listed, bucket, bits, causal]


@functools.cache
def _table() -> dict[tuple[str, int, int, int, bool], TileSize]:
    rows = json.loads(TABLE.read_text())["sizes"]
    return {
        (row["kernel"], row["architecture"], row["head_size"], row["bits"], row["causal"]): TileSize(*row["tile"])
        for row in rows
    }
