"""Compiles the norm kernels for an architecture given as argument and prints, a JSON object a line, what came of it.

A script of its own, because kernels that were imported under TRITON_INTERPRET cannot be compiled.
"""

import json
import sys

import torch

from bench.speed.ahead_of_time import compile_for
from kernels.norm import launch_backward, launch_forward

SIZES = [(768, torch.bfloat16), (4096, torch.bfloat16), (1024, torch.float32)]

for width, dtype in SIZES:  # layer norm with bias and residual holds most in registers
    rows, parameter, statistics = torch.empty(64, width, dtype=dtype), torch.empty(width), torch.empty(2, 64)
    with compile_for(int(sys.argv[1])) as compiled:
        launch_forward(rows, parameter, parameter, rows, rows, rows, statistics, 1e-5, True)
        launch_backward(rows, rows, rows, parameter, statistics, rows, True)
    for kernel in compiled:
        print(json.dumps({"width": width, "bits": dtype.itemsize * 8, **vars(kernel), "spills": kernel.spills()}))
