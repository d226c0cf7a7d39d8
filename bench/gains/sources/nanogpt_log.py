"""Logs of nanoGPT's train.py (github.com/karpathy/nanoGPT) and its forks: what it prints, kept in a file.

    tokens per iteration will be: 491,520
    number of parameters: 123.59M
    step 500: train loss 3.1234, val loss 3.2345
    iter 500: loss 3.1111, time 120.50ms, mfu 30.10%

Each log is a run, and its last evaluation a result; logs of different length are different budgets. Parameters are
those that train.py prints: without position embeddings, with the token embedding, which is also the head. Learning rate
and length are read where configurator.py printed them (`learning_rate = 6e-4`, `max_iters = 5000`). A log that does not
say `max_iters` counts as cut short where later iterations follow its last evaluation.
"""

import re
from pathlib import Path

import numpy as np

from bench.config import SourceConfig
from bench.gains.sources import Results
from bench.gains.sources.logs import LOSS, STEP, Log, follow, read_logs

EVENT = re.compile(
    rf"step (?P<evaluated>{STEP}): train loss \S+ val loss {LOSS}"
    rf"|iter (?P<trained>{STEP}): loss \S+ time (?P<time>\d+\.?\d*)ms"
)
TOKENS = re.compile(r"tokens per iteration will be: (\d[\d,]*)")
PARAMS = re.compile(r"number of parameters: (\d+\.\d\d)M")
TENSORS = re.compile(r"num (decayed|non-decayed) parameter tensors: \d+, with (\d[\d,]{0,30}) parameters")
SETTING = r"^(?:Overriding: )?{} *= *(\d[\d_]{{0,15}}(?:\.\d*)?(?:e[-+]?\d{{1,2}})?)\s"


def read(path: Path, config: SourceConfig, name: str) -> Results:
    """The logs at `path`: see `bench.gains.sources.logs.read_logs`."""
    return read_logs(path, config, name, parse)


def parse(text: str) -> Log:
    losses, times = follow(
        (int(event["evaluated"]), float(event[2]), float("nan"))
        if event["evaluated"]
        else (int(event["trained"]), None, float(event["time"]) / 1000)
        for event in EVENT.finditer(text)
    )
    tokens = TOKENS.search(text)
    planned = _setting("max_iters", text)
    return Log(
        losses=losses,
        seconds=_seconds(losses, times),
        trained=max([*losses, *times], default=0),
        planned=None if planned is None else int(planned),
        tokens_per_step=float(tokens[1].replace(",", "")) if tokens else None,
        params=_parameters(text),
        lr=_setting("learning_rate", text),
    )


def _setting(name: str, text: str) -> float | None:
    """The last value that configurator.py printed: overrides come after the file."""
    found = re.findall(SETTING.format(name), text, re.MULTILINE)
    return float(found[-1].replace("_", "")) if found else None


def _parameters(text: str) -> float | None:
    """As printed, rounded to 0.01 M; where there are less than a million, the exact count of all tensors."""
    printed = PARAMS.search(text)
    if printed and float(printed[1]) >= 1:
        return float(printed[1]) * 1e6
    tensors = {kind: int(count.replace(",", "")) for kind, count in TENSORS.findall(text)}
    return float(sum(tensors.values())) if len(tensors) == 2 else None


def _seconds(losses: dict[int, float], times: dict[int, float]) -> dict[int, float]:
    """Training time up to each evaluation, from the times of single iterations; nothing where these cannot tell.

    An iteration that was not logged took as long as the logged one before it. The clock of train.py runs on while it
    compiles and evaluates, so the first iteration and those of an evaluation count as long as the median of the others.
    """
    clean = [time for step, time in times.items() if step > 0 and step not in losses]
    if not clean or 0 not in times:
        return {}
    typical = np.median(clean)
    durations = [typical if step == 0 or step in losses else time for step, time in times.items()]
    starts = [*times, max([*times, *losses]) + 1]
    elapsed = np.append(0, np.cumsum(durations * np.diff(starts)))
    return {step: float(np.interp(step, starts, elapsed)) for step in losses}
