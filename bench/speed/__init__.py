"""How fast the training step (and later the kernels) are on this device, beside their peers."""

import json
from collections.abc import Sequence

from bench.compose import compose_config
from bench.config import settle
from bench.errors import UserError

OPS = ("training_step",)


def measure(overrides: Sequence[str]) -> int:
    """Measures what `op=` names, prints a table and a line of JSON."""
    from bench.speed.training_step import INNOVATIONS, measure_training_step

    config = compose_config([*overrides, f"innovation=[{','.join(INNOVATIONS)}]"])
    op = config.op
    if op not in ("all", *OPS):
        raise UserError(f"op={op} is unknown: choose all or {', '.join(OPS)}")
    figures = measure_training_step(settle(config))
    for name, rate in figures["tokens_per_second"].items():
        ratio = figures["ratio_to_peer"].get(name)
        print(f"{name:<24} {rate:10.0f} tokens/s" + (f"   ours / this = {ratio:.3f}" if ratio else ""))
    print(json.dumps(figures))
    return 0
