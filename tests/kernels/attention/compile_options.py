"""Compiles the attention kernels for sm_90 with every option and prints, a JSON list a line, what launched.

A script of its own, because kernels that were imported under TRITON_INTERPRET cannot be compiled.
"""

import json
from unittest import mock

import torch

from bench.speed.ahead_of_time import compile_for
from kernels.attention.fused import launch
from kernels.attention.fused.tile_sizes import TileSize
from kernels.attention.options import AttentionOptions

BOUNDS = torch.zeros(1, 128, dtype=torch.int32)
SEED = torch.zeros(1, dtype=torch.int64)
PLAIN = {"starts": None, "ends": None, "seed": None, "causal": True, "window": None, "softcap": None, "dropout_p": 0.0}
OPTIONS = [
    {},
    {"causal": False},
    {"window": 5},
    {"starts": BOUNDS, "ends": BOUNDS, "causal": False},
    {"starts": BOUNDS, "ends": BOUNDS, "window": 5},
    {"softcap": 5.0},
    {"softcap": 5.0, "seed": SEED, "dropout_p": 0.1},
]
SHAPES = [  # dtype, sequence, head size, value size
    (torch.float16, 1, 64, 64),
    (torch.bfloat16, 100, 80, 40),
    (torch.bfloat16, 100, 33, 20),  # rows that TMA cannot read
    (torch.float32, 100, 64, 64),
]


def compile_once(dtype: torch.dtype, sequence: int, size: int, value_size: int, **options) -> None:
    q = torch.empty(1, 4, sequence, size, dtype=dtype)
    k, v = q[:, :2], torch.empty(1, 2, sequence, value_size, dtype=dtype)
    out, lse = torch.empty(1, 4, sequence, value_size, dtype=dtype), torch.empty(1, 4, sequence)
    settled = AttentionOptions(**{**PLAIN, "scale": 0.1, "deterministic": True, **options})
    # What an option does to the code shows in small tiles too, which compile faster.
    tile = TileSize(32, 32, 8, 2) if dtype == torch.float32 else TileSize(64, 64, 4, 2)
    with mock.patch.object(launch, "choose_tile", return_value=tile), compile_for(90) as compiled:
        launch.forward(q, k, v, out, lse, settled)
        launch.backward(out, q, k, v, out, lse, q, k, v, settled)
    print(json.dumps([one.name for one in compiled]))


for chosen in OPTIONS:
    compile_once(torch.bfloat16, 128, 64, 64, **chosen)
for shape in SHAPES:
    compile_once(*shape)
compile_once(torch.bfloat16, 128, 64, 64, deterministic=False)
