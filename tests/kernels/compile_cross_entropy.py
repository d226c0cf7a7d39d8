"""Compiles the cross-entropy kernels for the architecture named on the command line and prints a JSON line for each.

A script of its own, because kernels that were imported under TRITON_INTERPRET cannot be compiled.
"""

import importlib
import json
import sys

import torch

from bench.speed.ahead_of_time import compile_for

# The names in the package are those of the functions.
cross_entropy = importlib.import_module("kernels.cross_entropy")
linear_cross_entropy = importlib.import_module("kernels.linear_cross_entropy")

PLAIN = cross_entropy.LossOptions(-100, None, 0.0, 0.0)
EVERY = cross_entropy.LossOptions(-100, 15.0, 1e-4, 0.1)
TOKENS, WIDTH = 128, 768


def launch(dtype: torch.dtype, vocabulary: int, width: int, options: cross_entropy.LossOptions) -> None:
    """All four kernels."""
    targets = torch.zeros(TOKENS, dtype=torch.int64)
    losses, lse = torch.empty(TOKENS), torch.empty(TOKENS)
    logits = torch.empty(1, TOKENS, vocabulary, dtype=dtype)
    cross_entropy._launch_forward(logits, targets, losses, lse, options)
    cross_entropy._launch_backward(losses, logits, targets, lse, logits, options)
    x, weight = torch.empty(TOKENS, width, dtype=dtype), torch.empty(vocabulary, width, dtype=dtype)
    linear_cross_entropy._linear_statistics_by_triton(x, weight, targets, options)
    d_logits = linear_cross_entropy._empty_chunk(x, TOKENS, vocabulary)
    linear_cross_entropy._store_d_logits_by_triton(losses, x, weight, targets, lse, d_logits, options)


architecture = int(sys.argv[1])
cases = [
    (torch.bfloat16, 50257, WIDTH, PLAIN),
    (torch.bfloat16, 50304, WIDTH, EVERY),
    (torch.float32, 50304, WIDTH, EVERY),
    (torch.float16, 17, 33, PLAIN),  # rows that TMA cannot read
]
for dtype, vocabulary, width, options in cases:
    with compile_for(architecture) as compiled:
        launch(dtype, vocabulary, width, options)
    for one in compiled:
        found = vars(one) | {"spills": one.spills()}
        print(json.dumps({"dtype": str(dtype), "width": width, "every_option": options == EVERY, **found}))
