"""Compiles the MLP kernels for the architecture named, such as 90, and prints, a JSON object a line, what came of it.

A script of its own, because kernels that were imported under TRITON_INTERPRET cannot be compiled.
"""

import json
import sys

import torch

from bench.speed.ahead_of_time import compile_for
from kernels.mlp import REFERENCES, linear_activation, linear_activation_backward

TOKENS, WIDTH, FEATURES = 4096, 768, 3072

CASES = [*((torch.bfloat16, activation) for activation in REFERENCES), (torch.float32, "gelu")]

for dtype, activation in CASES:
    rows = FEATURES * (2 if activation == "swiglu" else 1)
    x, d_out = torch.empty(TOKENS, WIDTH, dtype=dtype), torch.empty(TOKENS, FEATURES, dtype=dtype)
    weight, bias = torch.empty(rows, WIDTH, dtype=dtype), torch.empty(rows, dtype=dtype)
    with compile_for(int(sys.argv[1])) as compiled:
        linear_activation(x, weight, bias, activation)
        linear_activation_backward(d_out, x, weight, bias, activation)
    for kernel, direction in zip(compiled, ("forward", "backward"), strict=True):
        case = {"case": f"{activation} {direction}", "bits": x.element_size() * 8, "spills": kernel.spills()}
        print(json.dumps(vars(kernel) | case))
