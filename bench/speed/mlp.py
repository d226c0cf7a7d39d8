"""linear_relu_squared, linear_gelu and linear_swiglu, and the table that says where the Triton kernel is worthwhile."""

import json
from collections.abc import Sequence
from itertools import product
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch.nn import functional

import kernels
import kernels.mlp
from bench.errors import UserError
from bench.runs.folder import write_whole
from bench.speed.contest import Make
from bench.speed.ops import Case, Normal, absent, both, compiled, here, liger, measure_cases
from bench.training.device import Device, open_device

SIZES = {"cuda": ((16384, 768), (16384, 1024), (16384, 4096)), "cpu": ((256, 64),)}  # tokens, width
CHECKED = {"cuda": ((63, 768), (1000, 1024), (100, 4096)), "cpu": ((63, 48),)}
FEATURES = 4  # times the width

LIGER: dict[str, Make] = {
    "relu_squared": liger(
        "LigerReLUSquaredFunction", lambda apply: lambda x, weight: apply(functional.linear(x, weight))
    ),
    "gelu": absent("Liger-Kernel has no GELU but the gated tanh approximation"),
    "swiglu": liger(
        "LigerFusedGateUpSiLUMulFunction", lambda apply: lambda x, weight: apply(functional.linear(x, weight), False)
    ),
}


def measure(config: DictConfig) -> int:
    """With speed.write_table also writes `kernels/mlp_measured.json`."""
    device = open_device(OmegaConf.to_object(config.device))
    kind = device.torch_device.type
    if config.speed.write_table and (kind, device.precision) != ("cuda", "bfloat16"):
        raise UserError("speed.write_table needs a GPU in bfloat16: the table holds for 16 bits there")
    status, rows = measure_cases("mlp", cases(CHECKED[kind]), cases(SIZES[kind]), config, device)
    if config.speed.write_table and rows:
        write_table(rows, device)
    return status


def cases(sizes: Sequence[tuple[int, int]]) -> list[Case]:
    return [case(activation, *size) for size, activation in product(sizes, kernels.mlp.REFERENCES)]


def case(activation: str, tokens: int, width: int) -> Case:
    weight_rows = FEATURES * width * (2 if activation == "swiglu" else 1)
    reference = kernels.mlp.REFERENCES[activation]
    flops = 2.0 * tokens * width * weight_rows
    return Case(
        name=f"linear_{activation}",
        sizes={"tokens": tokens, "width": width, "features": FEATURES * width},
        inputs={"x": Normal((tokens, width)), "weight": Normal((weight_rows, width), width**-0.5)},
        ours=getattr(kernels, f"linear_{activation}"),
        reference=reference,
        peers={"eager": here(reference), "compiled": compiled(reference), "liger": LIGER[activation]},
        flops=both(flops, 2.0 * flops),
    )


def write_table(rows: list[dict[str, Any]], device: Device) -> None:
    """Notes the time of compiled PyTorch, forward and backward, over ours, by device, function and width; nothing
    stays of what was measured again and could not be compared.
    """
    table = json.loads(kernels.mlp.MEASURED.read_text())
    ratios = table.setdefault(device.description, {})
    for row in rows:
        by_width = ratios.setdefault(row["shape"]["function"], {})
        by_width.pop(str(row["shape"]["width"]), None)
        if "compiled" in row["both"]["ratios"]:
            by_width[str(row["shape"]["width"])] = round(row["both"]["ratios"]["compiled"], 3)
    write_whole(kernels.mlp.MEASURED, json.dumps(table, indent=1) + "\n")
    print(f"table: {kernels.mlp.MEASURED}")
