"""Compiles the rotary kernel for an architecture given as argument and prints, a JSON object a line, what came of it.

A script of its own, because kernels that were imported under TRITON_INTERPRET cannot be compiled.
"""

import json
import sys

import torch

from bench.speed.ahead_of_time import compile_for
from kernels.rope import launch

for size, dtype, interleaved in ((64, torch.bfloat16, False), (128, torch.bfloat16, True), (80, torch.float32, True)):
    q, k = (torch.empty(2, 1024, heads, size, dtype=dtype).transpose(1, 2) for heads in (12, 4))
    table = torch.empty(1024, size // 2)
    positions = torch.empty(2, 1024, dtype=torch.int64)
    with compile_for(int(sys.argv[1])) as compiled:
        launch(q, k, table, table, positions, q, k, interleaved, True)
    [kernel] = compiled
    print(json.dumps({"size": size, "bits": dtype.itemsize * 8, **vars(kernel), "spills": kernel.spills()}))
