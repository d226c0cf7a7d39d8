"""Logs of modded-nanogpt (github.com/KellerJordan/modded-nanogpt), as in its folder `records/`.

    step:125/1750 val_loss:4.6012 train_time:18500ms step_avg:148.00ms

or, in the oldest, llm.c's `s:5100 tel:3.2812`. A log begins with the code that wrote it, of which the batch size is
read where its comment says whether it counts sequences or tokens; otherwise set `data.tokens_per_step`. FLOPs need
`data.params` or `data.flops_per_token`. Without either, there are only the seconds of `train_time`, which older records
count from the 10th step.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path

from bench.config import SourceConfig
from bench.gains.sources import Results
from bench.gains.sources.logs import LOSS, STEP, Log, follow, read_logs

EVENT = re.compile(rf"step:({STEP})/({STEP})\s")
VALIDATION = re.compile(rf"val_loss:{LOSS}")
TIME = re.compile(r"train_time:(\d+\.?\d*)(ms|s)\b")
LLMC = re.compile(rf"\bs:({STEP}) (?:tel:{LOSS}|trl:)")
INTEGERS = r"\s*(?::\s*int\s*)?=\s*(\d{1,12}(?:\s*\*\s*\d{1,12})*)"
BATCH = re.compile(rf"^\s*batch_size{INTEGERS}\s*#.*\bin (sequences|tokens)\b", re.MULTILINE)
SEQUENCE = re.compile(rf"^\s*sequence_length{INTEGERS}", re.MULTILINE)


def read(path: Path, config: SourceConfig, name: str) -> Results:
    """The logs at `path`: see `bench.gains.sources.logs.read_logs`."""
    return read_logs(path, config, name, parse)


def parse(text: str) -> Log:
    losses, times = follow(_events(text))
    planned = [int(steps) for _, steps in EVENT.findall(text)]
    return Log(
        losses=losses,
        seconds={step: time for step, time in times.items() if not math.isnan(time)},
        trained=max([*losses, *times], default=0),
        planned=planned[-1] if planned else None,
        tokens_per_step=_tokens_per_step(text),
    )


def _events(text: str) -> Iterator[tuple[int, float | None, float]]:
    for line in text.splitlines(keepends=True):
        if step := EVENT.search(line):
            loss, time = VALIDATION.search(line), TIME.search(line)
            seconds = float(time[1]) / (1000 if time[2] == "ms" else 1) if time else math.nan
            yield int(step[1]), float(loss[1]) if loss else None, seconds
        elif step := LLMC.search(line):
            # llm.c counts a training step from where it starts: `s:5 trl:` takes the weights of `s:5 tel:` to step 6.
            yield (int(step[1]), float(step[2]), math.nan) if step[2] else (int(step[1]) + 1, None, math.nan)


def _tokens_per_step(text: str) -> float | None:
    batch, sequence = BATCH.search(text), SEQUENCE.search(text)
    if batch is None or (batch[2] == "sequences" and sequence is None):
        return None
    counts = [batch[1], *([sequence[1]] if sequence and batch[2] == "sequences" else [])]
    return float(math.prod(int(factor) for count in counts for factor in count.split("*")))
