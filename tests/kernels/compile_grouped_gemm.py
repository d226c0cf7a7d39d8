"""Compiles the grouped GEMM kernels for the architecture named, such as 90, and prints, a JSON object a line, what came
of it.

A script of its own, because kernels that were imported under TRITON_INTERPRET cannot be compiled.
"""

import json
import sys

import torch

from bench.speed.ahead_of_time import compile_for
from kernels.grouped_gemm import grouped_outer_product, grouped_product

TOKENS, EXPERTS, WIDTH, FEATURES = 4096, 8, 768, 3072

for dtype in (torch.bfloat16, torch.float32):
    x, d_out = torch.empty(TOKENS, WIDTH, dtype=dtype), torch.empty(TOKENS, FEATURES, dtype=dtype)
    weight = torch.empty(EXPERTS, WIDTH, FEATURES, dtype=dtype)
    offsets = torch.empty(EXPERTS, dtype=torch.int32)
    with compile_for(int(sys.argv[1])) as compiled:
        grouped_product(x, weight, offsets, "triton")
        grouped_product(d_out, weight.mT, offsets, "triton")
        grouped_outer_product(x, d_out, offsets, False, "triton")
    for kernel, case in zip(compiled, ("forward", "gradient of x", "gradient of weight"), strict=True):
        found = {"case": case, "bits": x.element_size() * 8, "spills": kernel.spills()}
        print(json.dumps(vars(kernel) | found))
